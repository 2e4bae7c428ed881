"""Build the bundled tiny Stable Diffusion from folders of captioned images, one stage after the other.

Every stage works on one diffusers folder, `--model_dir`, and goes on from what lies there; README.md has the commands.
"""

import argparse
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import l1_loss, mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

RESOLUTION = 64
CAPTION_TOKENS = 16

TEXT_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 64,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 48, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 16,
    "mid_block_add_attention": False,
    "sample_size": RESOLUTION,
}
UNET = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 64, 96],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 64,
    "sample_size": RESOLUTION // 4,
}
# The values of Stable Diffusion 1.5; DDIM made from them needs `clip_sample`, or it clips the latents.
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}
TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": CAPTION_TOKENS,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "do_lower_case": True,
    "add_prefix_space": False,
    "errors": "replace",
}

SAMPLE_CAPTIONS = """grinning face, red apple, france flag, dog face, cat face, house building, automobile,
white medium star, heavy black heart, slice of pizza, evergreen tree, crescent moon, smiling face with sunglasses,
green book, large blue circle, ship, alarm clock, sunflower, guitar, hamburger, airplane, lion face, police officer,
keyboard"""
# A flipped flag, letter or clock is another one, so images with such captions are not flipped.
ONE_SIDED = re.compile(r"flag|left|right|letter|squared|clock|keycap|symbol|sign|arrow|ideograph|digit")


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    stages = parser.add_subparsers(dest="stage", required=True)

    def add_stage(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        stage = stages.add_parser(name, help=run.__doc__, description=run.__doc__, formatter_class=formatter)
        stage.set_defaults(run=run)
        stage.add_argument("--model_dir", type=Path, required=True, help="Diffusers folder that is built.")
        stage.add_argument("--start_from", type=Path, help="Diffusers folder that is copied to --model_dir first.")
        stage.add_argument("--data_dirs", type=Path, nargs="*", default=[], help="Imagefolders with metadata.jsonl.")
        stage.add_argument("--seed", type=int, default=0, help="Seed of every draw.")
        stage.add_argument("--num_threads", type=int, default=torch.get_num_threads(), help="CPU threads.")
        return stage

    def add_training(stage: argparse.ArgumentParser, steps: int, batch_size: int, learning_rate: float) -> None:
        stage.add_argument("--max_train_steps", type=int, default=steps, help="Optimizer steps.")
        stage.add_argument("--max_minutes", type=float, default=math.inf, help="The learning rate is 0 by then, too.")
        stage.add_argument("--batch_size", type=int, default=batch_size, help="Images per step.")
        stage.add_argument("--learning_rate", type=float, default=learning_rate, help="Peak of the cosine.")
        stage.add_argument("--random_flip", action=argparse.BooleanOptionalAction, default=True, help="Flip half.")
        stage.add_argument("--save_steps", type=int, default=500, help="Steps between two saves.")

    stage = add_stage("text-encoder", build_text_encoder)
    stage.add_argument("--tokenizer_dir", type=Path, required=True, help="Holds CLIP's vocab.json and merges.txt.")
    stage = add_stage("vae", train_vae)
    add_training(stage, steps=4000, batch_size=16, learning_rate=1e-3)
    stage.add_argument("--freeze_encoder", action="store_true", help="Keep the latents, so that a UNet stays valid.")
    stage.add_argument("--kl_weight", type=float, default=1e-6, help="Weight of the KL divergence.")
    stage = add_stage("unet", train_unet)
    add_training(stage, steps=20000, batch_size=32, learning_rate=1e-3)
    stage.add_argument("--text_learning_rate", type=float, default=1e-4, help="Peak for the text encoder; 0 = frozen.")
    stage.add_argument("--caption_dropout", type=float, default=0.1, help="Share of captions that are made empty.")
    stage.add_argument("--max_weight", type=float, default=1.0, help="Bound of the weight 1/SNR: above 1 for colours.")
    stage.add_argument("--ema_decay", type=float, default=0.999, help="Decay of the mean weights, which are saved.")
    stage = add_stage("sample", sample)
    stage.add_argument("--output_file", type=Path, required=True, help="PNG of the grid.")
    stage.add_argument("--num_inference_steps", type=int, default=25, help="DDIM steps.")
    stage.add_argument("--guidance_scale", type=float, default=2.5, help="Classifier-free guidance.")
    stage = add_stage("export", export)
    stage.add_argument("--output_dir", type=Path, required=True, help="Receives the float16 folder.")
    return parser.parse_args()


def read_images(folders: list[Path]) -> tuple[torch.Tensor, list[str]]:
    """Return the images (N, 3, 64, 64) in [-1, 1] and their captions."""
    pixels, captions = [], []
    for folder in folders:
        for row in map(json.loads, (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()):
            image = Image.open(folder / row["file_name"]).convert("RGB").resize((RESOLUTION, RESOLUTION))
            pixels.append(np.asarray(image))
            captions.append(row["text"])
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1, captions


def tokenize(model_dir: Path, captions: list[str]) -> torch.Tensor:
    """Return the token ids (N, 16) of captions."""
    tokenizer = CLIPTokenizer.from_pretrained(model_dir, subfolder="tokenizer")
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def write_json(content: dict, path: Path) -> None:
    """Write a readable JSON file and the folder it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_text_encoder(text_encoder: CLIPTextModel, model_dir: Path) -> None:
    """Write the text encoder under the key names that every version of transformers and diffusers reads."""
    folder = model_dir / "text_encoder"
    text_encoder.config.save_pretrained(folder)
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in text_encoder.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def build_text_encoder(args: argparse.Namespace) -> None:
    """Make tokenizer, scheduler and a random text encoder whose embeddings have mean 0 and variance 1."""
    folder = args.model_dir / "tokenizer"
    write_json(TOKENIZER, folder / "tokenizer_config.json")
    write_json({key: TOKENIZER[key] for key in TOKENIZER if key.endswith("_token")}, folder / "special_tokens_map.json")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(args.tokenizer_dir / name, folder / name)
    write_json(SCHEDULER, args.model_dir / "scheduler" / "scheduler_config.json")
    write_json(MODEL_INDEX, args.model_dir / "model_index.json")

    config = CLIPTextConfig(**TEXT_ENCODER, architectures=["CLIPTextModel"], dtype="float32")
    text_encoder = CLIPTextModel(config).eval()
    ids = tokenize(args.model_dir, read_images(args.data_dirs)[1])
    with torch.no_grad():
        embeddings = text_encoder(ids)[0].flatten(0, 1)
        norm = next(module for name, module in text_encoder.named_modules() if name.endswith("final_layer_norm"))
        std, mean = torch.std_mean(embeddings, dim=0)
        norm.weight.copy_(1 / std)
        norm.bias.copy_(-mean / std)
    save_text_encoder(text_encoder, args.model_dir)


def train_steps(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """Yield step numbers with the learning rate set to a cosine that ends with the steps or with the time."""
    start = time.monotonic()
    for step in range(args.max_train_steps):
        progress = max(step / args.max_train_steps, (time.monotonic() - start) / 60 / args.max_minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min((step + 1) / 100, (1 + math.cos(math.pi * progress)) / 2)
        yield step
        if step % 100 == 0:
            print(f"step {step}, {(time.monotonic() - start) / 60:.1f} minutes, {progress:.0%}", flush=True)


def train_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder on L1 + L2 + a little KL, and set its scaling factor from the latents."""
    images, _ = read_images(args.data_dirs)
    exists = (args.model_dir / "vae").exists()
    vae = AutoencoderKL.from_pretrained(args.model_dir, subfolder="vae") if exists else AutoencoderKL(**VAE)
    vae.to(memory_format=torch.channels_last)
    trained = [vae.decoder, vae.post_quant_conv] if args.freeze_encoder else [vae]
    parameters = [parameter for module in trained for parameter in module.parameters()]
    optimizer = torch.optim.Adam([{"params": parameters, "initial_lr": args.learning_rate}])

    def save() -> None:
        if not args.freeze_encoder:
            vae.register_to_config(scaling_factor=1 / encode(vae, images)[0].std().item())
        vae.save_pretrained(args.model_dir / "vae")

    for step in train_steps(args, optimizer):
        batch = images[torch.randint(len(images), (args.batch_size,))]
        batch = torch.where(torch.rand(len(batch), 1, 1, 1) < args.random_flip / 2, batch.flip(-1), batch)
        with torch.set_grad_enabled(not args.freeze_encoder):
            posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = l1_loss(decoded, batch) + mse_loss(decoded, batch) + args.kl_weight * posterior.kl().mean()
        take_step(loss, optimizer, parameters)
        if (step + 1) % args.save_steps == 0:
            print(f"loss {loss.item():.4f}", flush=True)
            save()
    save()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (N, 4, 16, 16) of the latents, not scaled."""
    posteriors = [vae.encode(batch).latent_dist for batch in images.split(64)]
    return torch.cat([each.mean for each in posteriors]), torch.cat([each.std for each in posteriors])


def take_step(loss: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    """Take one optimizer step with the gradients clipped to norm 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_unet(args: argparse.Namespace) -> None:
    """Train the UNet to predict the noise, together with the text encoder, and save the mean of their weights."""
    images, captions = read_images(args.data_dirs)
    vae = AutoencoderKL.from_pretrained(args.model_dir, subfolder="vae")
    flips = [encode(vae, flipped) for flipped in (images, images.flip(-1))]
    means, stds = (torch.stack(each) * vae.config.scaling_factor for each in zip(*flips, strict=True))
    may_flip = torch.tensor([args.random_flip and ONE_SIDED.search(caption) is None for caption in captions])
    ids = tokenize(args.model_dir, [*captions, ""])
    schedule = DDPMScheduler.from_config(SCHEDULER)
    # Large areas and their colours are decided at high noise, where an error of the noise is small (arXiv 2303.09556).
    weights = (1 / schedule.alphas_cumprod - 1).clamp(1.0, args.max_weight)
    weights /= weights.mean()

    text_encoder = CLIPTextModel.from_pretrained(args.model_dir, subfolder="text_encoder").train()
    exists = (args.model_dir / "unet").exists()
    unet = UNet2DConditionModel.from_pretrained(args.model_dir, subfolder="unet") if exists else None
    unet = (unet or UNet2DConditionModel(**UNET)).train().to(memory_format=torch.channels_last)  # 1.5 times as fast
    groups = [(unet, args.learning_rate), (text_encoder, args.text_learning_rate)]
    optimizer = torch.optim.Adam([{"params": list(part.parameters()), "initial_lr": rate} for part, rate in groups])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ema = EMAModel(parameters, decay=args.ema_decay, foreach=True)

    def save() -> None:
        ema.store(parameters)
        ema.copy_to(parameters)
        unet.save_pretrained(args.model_dir / "unet")
        save_text_encoder(text_encoder, args.model_dir)
        ema.restore(parameters)

    losses = []
    for step in train_steps(args, optimizer):
        rows = torch.randint(len(captions), (args.batch_size,))
        flipped = (torch.rand(len(rows)) < 0.5) & may_flip[rows]
        means_of_rows, stds_of_rows = means[flipped.long(), rows], stds[flipped.long(), rows]
        latents = means_of_rows + stds_of_rows * torch.randn_like(means_of_rows)
        caption_rows = torch.where(torch.rand(len(rows)) < args.caption_dropout, len(captions), rows)
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (len(rows),))
        noisy = schedule.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        prediction = unet(noisy, timesteps, text_encoder(ids[caption_rows])[0]).sample
        loss = (weights[timesteps] * (prediction - noise).square().mean((1, 2, 3))).mean()
        take_step(loss, optimizer, parameters)
        ema.step(parameters)
        losses.append(loss.item())
        if (step + 1) % args.save_steps == 0:
            print(f"loss {np.mean(losses[-args.save_steps :]):.4f}", flush=True)
            save()
    save()


@torch.no_grad()
def denoising_loss(pipeline: StableDiffusionPipeline, images: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the mean squared error of the noise at ten fixed timesteps with fixed noise."""
    schedule = DDPMScheduler.from_config(SCHEDULER)
    latents = encode(pipeline.vae, images)[0] * pipeline.vae.config.scaling_factor
    embeddings = torch.cat([pipeline.text_encoder(batch)[0] for batch in ids.split(64)])
    losses = []
    for timestep in range(50, 1000, 100):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(timestep))
        noisy = schedule.add_noise(latents, noise, torch.tensor([timestep]))
        for batch in torch.arange(len(latents)).split(64):
            prediction = pipeline.unet(noisy[batch], timestep, embeddings[batch]).sample
            losses.append((prediction - noise[batch]).square().mean((1, 2, 3)))
    return torch.cat(losses).mean().item()


def sample(args: argparse.Namespace) -> None:
    """Draw a grid of 24 captions, and print the denoising loss on the first 512 images of each folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(args.model_dir, local_files_only=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    draw = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    generator = torch.Generator().manual_seed(args.seed)
    generated = pipeline(re.split(r",\s+", SAMPLE_CAPTIONS), generator=generator, output_type="np", **draw).images
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in (generated[:12], generated[12:])])
    Image.fromarray((grid * 255).round().astype(np.uint8)).save(args.output_file)
    for folder in args.data_dirs:
        images, captions = read_images([folder])
        loss = denoising_loss(pipeline, images[:512], tokenize(args.model_dir, captions[:512]))
        print(f"denoising loss on {folder.parent.name}/{folder.name}: {loss:.5f}")


def export(args: argparse.Namespace) -> None:
    """Write the folder with its weights in float16 and without the paths that diffusers notes in its configs."""
    shutil.copytree(args.model_dir, args.output_dir, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for path in args.output_dir.rglob("*.safetensors"):
        save_file({key: value.half() for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    for path in args.output_dir.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        write_json(config, path)


def main() -> None:
    """Run one stage."""
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    if args.start_from:
        shutil.copytree(args.start_from, args.model_dir, dirs_exist_ok=True, copy_function=shutil.copyfile)
    args.run(args)


if __name__ == "__main__":
    main()
