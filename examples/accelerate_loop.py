"""A fine-tuning loop in the manner of diffusers' examples, with accelerate. The lines marked `# +` are the guard's.

It fine-tunes the bundled tiny model on the demo images, on a CPU or one GPU, and saves checkpoints and the UNet:

    accelerate launch --num_processes 1 examples/accelerate_loop.py --output_dir runs/accelerate_loop
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer

from sd_memguard import GuardConfig, MemorizationGuard  # +
from sd_memguard.assets import demo_data_path, tiny_sd_path


class Images(Dataset):
    """Captioned images with an ordinary transform, into which the guard puts its augmentation."""

    def __init__(self, folder: Path, tokenizer: CLIPTokenizer, limit: int) -> None:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
        self.folder, self.rows = folder, [json.loads(line) for line in lines]
        texts = [row["text"] for row in self.rows]
        self.input_ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        steps = [transforms.Resize(64), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize([0.5], [0.5])])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return an image, (3, 64, 64) in [-1, 1], and its caption's tokens."""
        image = Image.open(self.folder / self.rows[index]["file_name"]).convert("RGB")
        return {"pixel_values": self.transform(image), "input_ids": self.input_ids[index]}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=60)
    parser.add_argument("--max_train_samples", type=int, default=128)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--checkpointing_steps", type=int, default=1000)
    parser.add_argument("--resume_from_checkpoint", type=Path)
    return parser.parse_args()


def main() -> None:
    """Fine-tune and save."""
    args = parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    set_seed(0)
    folder = tiny_sd_path()
    noise_scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
    text_encoder.to(accelerator.device)
    vae.to(accelerator.device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-4)
    dataset = Images(demo_data_path(), tokenizer, args.max_train_samples)
    train_dataloader = DataLoader(dataset, batch_size=args.train_batch_size, shuffle=True)
    lr_scheduler = get_scheduler("linear", optimizer, num_warmup_steps=5, num_training_steps=args.max_train_steps)

    guard = MemorizationGuard(GuardConfig(num_shards=2, steps_per_round=10, seed=0), num_samples=len(dataset))  # +
    accelerated = (accelerator, unet, optimizer, train_dataloader, lr_scheduler)
    prepared = guard.prepare(*accelerated, total_steps=args.max_train_steps)  # + in place of accelerator.prepare
    unet, optimizer, train_dataloader, lr_scheduler = prepared
    global_step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        global_step = int(args.resume_from_checkpoint.name.split("-")[1])
    while global_step < args.max_train_steps:
        for batch in train_dataloader:
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                steps = noise_scheduler.config.num_train_timesteps
                timesteps = torch.randint(0, steps, (len(latents),), device=latents.device)
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                encoder_hidden_states = text_encoder(batch["input_ids"])[0]
                model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
                losses = F.mse_loss(model_pred, noise, reduction="none").mean(dim=(1, 2, 3))
                loss = guard.weigh(losses, timesteps, batch["sample_id"]).loss  # + in place of losses.mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                global_step += 1
                if global_step % args.checkpointing_steps == 0:
                    accelerator.save_state(args.output_dir / f"checkpoint-{global_step}")
            if global_step == args.max_train_steps:
                break
    with guard.averaged(unet):  # + what is saved is the mean of the proxies
        trained = accelerator.unwrap_model(unet)
        StableDiffusionPipeline.from_pretrained(folder, unet=trained).save_pretrained(args.output_dir)
    print(f"{int(guard.ledger.actions['skipped'].sum())} of {int(guard.ledger.seen.sum())} samples were skipped")


if __name__ == "__main__":
    main()
