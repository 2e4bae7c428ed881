"""The guard in a training loop of your own, in plain torch: the lines marked with `# guard` are all it takes.

Fine-tunes the UNet of the bundled tiny Stable Diffusion for a few steps on its demo images: two shards train a proxy
each, which are averaged in rounds, and samples whose loss is abnormally low are skipped. Run it anywhere, on a CPU:

    python examples/plug_into_your_loop.py --steps 60
"""

import argparse
import json

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from sd_memguard import GuardConfig, MemorizationGuard
from sd_memguard.assets import demo_data_path, tiny_sd_path

BATCH_SIZE = 16


def read_images(count: int) -> tuple[Tensor, list[str]]:
    """Return the first demo images, (count, 3, 64, 64) in [-1, 1], and their captions."""
    folder = demo_data_path()
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    pixels = np.stack([np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, [row["text"] for row in rows]


@torch.no_grad()
def encode(pipeline: StableDiffusionPipeline, pixels: Tensor, captions: list[str]) -> list[dict[str, Tensor]]:
    """Return a row per image: latents (4, 16, 16) and text embeddings (tokens, width)."""
    latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
    tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    embeddings = pipeline.text_encoder(tokens.input_ids)[0]
    return [{"latents": x, "embeddings": e} for x, e in zip(latents, embeddings, strict=True)]


def train(steps: int, num_images: int = 128) -> MemorizationGuard:
    """Fine-tune and return the guard with what it has counted."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_path(), use_safetensors=True)
    unet, scheduler = pipeline.unet.train(), DDPMScheduler.from_config(pipeline.scheduler.config)
    rows = encode(pipeline, *read_images(num_images))
    loader = DataLoader(rows, batch_size=BATCH_SIZE, shuffle=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-4)
    config = GuardConfig(num_shards=2, steps_per_round=10, augment_threshold=0)  # guard: latents cannot be augmented
    guard = MemorizationGuard(config, num_samples=len(rows))  # guard
    loader, step = guard.attach(unet, optimizer, loader, total_steps=steps), 0  # guard
    while step < steps:
        for batch in loader:
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (BATCH_SIZE,))
            noise = torch.randn_like(batch["latents"])
            noisy = scheduler.add_noise(batch["latents"], noise, timesteps)
            prediction = unet(noisy, timesteps, batch["embeddings"]).sample
            losses = F.mse_loss(prediction, noise, reduction="none").mean(dim=(1, 2, 3))  # one loss per sample
            verdict = guard.weigh(losses, timesteps, batch["sample_id"])  # guard
            verdict.loss.backward()  # guard: in place of losses.mean()
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0:
                print(f"step {step:4d}: loss {losses.mean():.4f}, skipped {verdict.num_skipped} of {BATCH_SIZE}")
            if (step := step + 1) == steps:
                break
    with guard.averaged(unet):  # guard: generate with the averaged weights, and save them
        pipeline("a smiling face", num_inference_steps=2, height=64, width=64)
    return guard


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: 60)")
    ledger = train(parser.parse_args().steps).ledger
    print(f"{int(ledger.actions['skipped'].sum())} of {int(ledger.seen.sum())} samples were skipped")
