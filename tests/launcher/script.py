"""A small script in the manner of diffusers' examples, with the loss patterns that are found in them."""

import argparse
import math
import os

import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_train_steps", type=int, default=None)
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--snr_gamma", type=float, default=None)
    parser.add_argument("--prior", choices=["first", "last"], default=None)
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--one_by_one", action="store_true")
    parser.add_argument("--own_loss", action="store_true")
    parser.add_argument("--cache_latents", action="store_true")
    parser.add_argument("--loss_type", default="l2")
    parser.add_argument("--checkpointing_steps", type=int, default=1000)
    parser.add_argument("--resume_from_checkpoint", default=None)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Latents(torch.utils.data.Dataset):
    def __init__(self):
        self.latents = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        self.class_latents = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, index):
        return {"latents": self.latents[index], "class_latents": self.class_latents[index]}


def main():
    args = parse_args()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps)
    set_seed(args.seed)
    unet = UNet2DConditionModel.from_pretrained(args.pretrained_model_name_or_path, subfolder="unet")
    noise_scheduler = DDPMScheduler.from_pretrained(args.pretrained_model_name_or_path, subfolder="scheduler")
    unet.train()
    if args.use_ema:
        ema_unet = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)

    def save_model_hook(models, weights, output_dir):
        for model in models:
            model.save_pretrained(os.path.join(output_dir, "unet"))
            weights.pop()

    def load_model_hook(models, input_dir):
        for _ in range(len(models)):
            model = models.pop()
            model.load_state_dict(UNet2DConditionModel.from_pretrained(input_dir, subfolder="unet").state_dict())

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    if args.lora:
        unet.requires_grad_(False)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3)

    def collate_fn(examples):
        rows = [example["latents"] for example in examples]
        if args.prior:
            rows += [example["class_latents"] for example in examples]
        return {"latents": torch.stack(rows)}

    train_dataloader = torch.utils.data.DataLoader(Latents(), batch_size=4, shuffle=True, collate_fn=collate_fn)
    steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    lr_scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=args.max_train_steps)
    if args.one_by_one:
        unet, optimizer = accelerator.prepare(unet), accelerator.prepare(optimizer)
        train_dataloader, lr_scheduler = accelerator.prepare(train_dataloader), accelerator.prepare(lr_scheduler)
    else:
        unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
            unet, optimizer, train_dataloader, lr_scheduler
        )
    global_step = first_epoch = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        global_step = int(args.resume_from_checkpoint.split("-")[-1])
        first_epoch = global_step // steps_per_epoch

    for _ in range(first_epoch, math.ceil(args.max_train_steps / steps_per_epoch)):
        for batch in train_dataloader:
            with accelerator.accumulate(unet):
                latents = batch["latents"]
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),))
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                states = torch.zeros(len(latents), 3, unet.config.cross_attention_dim)
                model_pred = unet(noisy, timesteps, states, return_dict=False)[0]
                target, weights_of = noise, timesteps
                prior_loss = 0.0
                if args.prior:
                    model_pred, prior_pred = torch.chunk(model_pred, 2, dim=0)
                    target, prior_target = torch.chunk(target, 2, dim=0)
                    weights_of = torch.chunk(timesteps, 2)[0]
                if args.prior == "first":
                    prior_loss = F.mse_loss(prior_pred.float(), prior_target.float(), reduction="mean")
                if args.own_loss:
                    loss = (model_pred - target).square().mean()
                elif args.snr_gamma is None:
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
                else:
                    snr = compute_snr(noise_scheduler, weights_of)
                    mse_loss_weights = torch.stack([snr, args.snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
                    loss = loss.mean(dim=list(range(1, len(loss.shape)))) * (mse_loss_weights / snr)
                    loss = loss.mean()
                if args.prior == "last":
                    prior_loss = F.mse_loss(prior_pred.float(), prior_target.float(), reduction="mean")
                accelerator.backward(loss + prior_loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                if args.use_ema:
                    ema_unet.step(unet.parameters())
                global_step += 1
                if global_step % args.checkpointing_steps == 0:
                    accelerator.save_state(os.path.join(args.output_dir, f"checkpoint-{global_step}"))
            if global_step >= args.max_train_steps:
                break

    accelerator.wait_for_everyone()
    unet = accelerator.unwrap_model(unet)
    if args.use_ema:
        ema_unet.copy_to(unet.parameters())
    if args.lora:
        save_file(get_peft_model_state_dict(unet), os.path.join(args.output_dir, "lora.safetensors"))
    else:
        unet.save_pretrained(os.path.join(args.output_dir, "unet"))


if __name__ == "__main__":
    main()
