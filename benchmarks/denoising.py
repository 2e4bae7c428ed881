"""The denoising loss of a UNet on captioned images at fixed timesteps with fixed noise, by code of its own.

Every model that is compared meets the same timesteps and the same noise, so differences are paired.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

BATCH_SIZE = 16
NOISES_PER_IMAGE = 4


ENCODING: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    },
    "StableDiffusionXLPipeline": {"do_classifier_free_guidance": False},
}
"""Arguments of ``encode_prompt`` of each pipeline."""


class Encoded(NamedTuple):
    """Images as the UNet meets them: mean latents (N, 4, h, w), embeddings (N, tokens, width), the noise schedule.

    ``added`` holds what the UNet of SDXL takes besides, (N, width) each.
    """

    latents: Tensor
    embeddings: Tensor
    schedule: DDPMScheduler
    added: dict[str, Tensor] | None = None


@torch.no_grad()
def encode(pixels: Tensor, captions: Sequence[str], pipeline: Any) -> Encoded:
    """Encode images and captions with the networks that no fine-tune changes.

    Args:
        pixels: (N, H, W, 3) uint8.
        captions: N captions.
        pipeline: holds the VAE and the text encoders, in float32. The UNet of SDXL is told the size as it is here.
    """
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = [pipeline.vae.encode(part).latent_dist.mean for part in images.split(BATCH_SIZE)]
    parts = [list(captions[start : start + BATCH_SIZE]) for start in range(0, len(captions), BATCH_SIZE)]
    encoded = [pipeline.encode_prompt(part, **ENCODING[type(pipeline).__name__]) for part in parts]
    added = None
    if hasattr(pipeline, "text_encoder_2"):
        height, width = images.shape[2:]
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).float().expand(len(images), -1)
        added = {"text_embeds": torch.cat([one[2] for one in encoded]), "time_ids": sizes}
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    latent = torch.cat(latents) * pipeline.vae.config.scaling_factor
    return Encoded(latent, torch.cat([one[0] for one in encoded]), schedule, added)


@torch.no_grad()
def denoising_losses(unet: UNet2DConditionModel, encoded: Encoded) -> Tensor:
    """Return the mean squared error of the predicted noise for each image, (N,) float64.

    Four timesteps per image, one from each quarter of the schedule.
    """
    unet.eval()
    generator = torch.Generator().manual_seed(20250101)
    losses = []
    for quarter in range(NOISES_PER_IMAGE):
        for rows in torch.arange(len(encoded.latents)).split(BATCH_SIZE):
            latents, embeddings = encoded.latents[rows], encoded.embeddings[rows]
            added = None if encoded.added is None else {name: row[rows] for name, row in encoded.added.items()}
            noise = torch.randn(latents.shape, generator=generator)
            place = (torch.rand(len(latents), generator=generator) + quarter) / NOISES_PER_IMAGE
            timesteps = (place * encoded.schedule.config.num_train_timesteps).long()
            noisy = encoded.schedule.add_noise(latents, noise, timesteps)
            predicted = unet(noisy, timesteps, embeddings, added_cond_kwargs=added).sample
            losses.append((predicted - noise).square().mean(dim=(1, 2, 3)))
    return torch.cat(losses).double().view(NOISES_PER_IMAGE, -1).mean(0)
