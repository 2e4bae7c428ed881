"""What an attack is: it asks a model about captioned images, and answers by a score or by generated images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import PIL.Image
import torch
from PIL import Image
from torch import Tensor

from sd_memguard.audit.features.extractors import Thumbnails
from sd_memguard.audit.metrics.signals import Conditioning
from sd_memguard.core.seeding import draw_normal

SIZE = 64
"""Edge of the generated images that an attack answers with."""


class Generation(NamedTuple):
    """How the audit generates, and the seed of everything random."""

    num_inference_steps: int
    guidance_scale: float
    seed: int


class Attack(ABC):
    """One attack; its constants are its budget.

    Attributes:
        name: As ``--attacks`` names it.
        title: In words.
        num_answers: Images generated for each attacked image, None where the answer is a score.
        num_attacked: Most training images, and most held-out ones, that are attacked.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    num_answers: ClassVar[int | None] = None
    num_attacked: ClassVar[int] = 256

    @abstractmethod
    def evaluations(self, generation: Generation) -> int:
        """Return the cost of one image: rows that the UNet is given; a row with a gradient counts three times."""

    @abstractmethod
    def answer(
        self, pipeline: Any, captions: Sequence[str], images: Sequence[PIL.Image.Image], generation: Generation
    ) -> Tensor:
        """Ask about captioned images.

        Args:
            pipeline: From ``load_pipeline``.
            captions: B captions.
            images: Their images.
            generation: How the audit generates.

        Returns:
            (B,) float scores, high for what was trained on; or (B, num_answers, 64, 64, 3) uint8 generated images, the
            last one the result of the attack.

        Raises:
            NotMeasurableError: The model is of a kind that the attack is not written for.
        """


def initial_latents(pipeline: Any, count: int, seed: int, purpose: str, number: int = 0) -> Tensor:
    """Return noise (B, C, H, W) to start from, the same for all."""
    unet = pipeline.unet
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = draw_normal(seed, purpose, [(number,)], shape).to(pipeline.device, unet.dtype)
    return noise.expand(count, *shape) * pipeline.scheduler.init_noise_sigma


@torch.no_grad()
def denoise(
    pipeline: Any, conditioning: Conditioning, latents: Tensor, timesteps: Tensor, guidance_scale: float
) -> Tensor:
    """Return latents (B, C, H, W) after DDIM steps at these timesteps of the scheduler's own.

    Args:
        pipeline: Whose scheduler has its timesteps set.
        conditioning: With its B unconditional rows in front.
        latents: (B, C, H, W).
        timesteps: Some of the scheduler's, descending.
        guidance_scale: Of classifier-free guidance.
    """
    for timestep in timesteps:
        both = pipeline.scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        without, text = pipeline.unet(both, timestep, **conditioning.arguments()).sample.chunk(2)
        latents = pipeline.scheduler.step(without + guidance_scale * (text - without), timestep, latents).prev_sample
    return latents


@torch.no_grad()
def decode(pipeline: Any, latents: Tensor) -> Tensor:
    """Return the images of latents as (B, 64, 64, 3) uint8."""
    pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.float().cpu()
    images = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return torch.stack([Thumbnails().prepare(Image.fromarray(image.numpy())) for image in images])
