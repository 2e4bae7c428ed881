"""The denoising loss of a UNet on captioned images at fixed timesteps with fixed noise, by code of its own.

Every model that is compared meets the same timesteps and the same noise, so differences are paired.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

BATCH_SIZE = 16
NOISES_PER_IMAGE = 4


class Encoded(NamedTuple):
    """Images as the UNet meets them: mean latents (N, 4, h, w), embeddings (N, tokens, width), the noise schedule."""

    latents: Tensor
    embeddings: Tensor
    schedule: DDPMScheduler


@torch.no_grad()
def encode(pixels: Tensor, captions: Sequence[str], pipeline: StableDiffusionPipeline) -> Encoded:
    """Encode images and captions with the networks that no fine-tune changes.

    Args:
        pixels: (N, H, W, 3) uint8.
        captions: N captions.
        pipeline: holds the VAE and the text encoder, in float32.
    """
    tokens = pipeline.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = [pipeline.vae.encode(part).latent_dist.mean for part in images.split(BATCH_SIZE)]
    embeddings = [pipeline.text_encoder(part)[0] for part in tokens.input_ids.split(BATCH_SIZE)]
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    return Encoded(torch.cat(latents) * pipeline.vae.config.scaling_factor, torch.cat(embeddings), schedule)


@torch.no_grad()
def denoising_losses(unet: UNet2DConditionModel, encoded: Encoded) -> Tensor:
    """Return the mean squared error of the predicted noise for each image, (N,) float64.

    Four timesteps per image, one from each quarter of the schedule.
    """
    unet.eval()
    generator = torch.Generator().manual_seed(20250101)
    losses = []
    for quarter in range(NOISES_PER_IMAGE):
        for latents, embeddings in zip(
            encoded.latents.split(BATCH_SIZE), encoded.embeddings.split(BATCH_SIZE), strict=True
        ):
            noise = torch.randn(latents.shape, generator=generator)
            place = (torch.rand(len(latents), generator=generator) + quarter) / NOISES_PER_IMAGE
            timesteps = (place * encoded.schedule.config.num_train_timesteps).long()
            noisy = encoded.schedule.add_noise(latents, noise, timesteps)
            losses.append((unet(noisy, timesteps, embeddings).sample - noise).square().mean(dim=(1, 2, 3)))
    return torch.cat(losses).double().view(NOISES_PER_IMAGE, -1).mean(0)
