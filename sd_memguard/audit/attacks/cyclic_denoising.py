"""Generated images that are noised and denoised over and over, until they fall to what attracts them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import PIL.Image
import torch
from torch import Tensor

from sd_memguard.audit.attacks.base import Attack, Generation, decode, denoise, initial_latents
from sd_memguard.audit.metrics.signals import encode_captions
from sd_memguard.core.seeding import draw_normal


class CyclicDenoising(Attack):
    """Cycles of partial noising and denoising, from an image that was generated from the caption.

    After arXiv 2610.11670, where the share of memorized images that are extracted grows from 0.1% at the first
    generation to over 30% after 500 cycles. A cycle: ``x <- sqrt(a_t) x + sqrt(1 - a_t) n`` with new noise n at the
    timestep t nearest ``strength``, then the DDIM steps from t to 0 with the caption. That schedule, 10 cycles and a
    strength of 0.5 are this project's choice. The first answer is the image before the cycles.
    """

    name: ClassVar[str] = "cyclic_denoising"
    title: ClassVar[str] = "cyclic denoising, 10 cycles at half the noise"
    num_answers: ClassVar[int | None] = 2
    num_attacked: ClassVar[int] = 32
    num_cycles: ClassVar[int] = 10
    strength: ClassVar[float] = 0.5

    def evaluations(self, generation: Generation) -> int:
        """Return the cost of one image."""
        steps = generation.num_inference_steps
        return 2 * (steps + self.num_cycles * self._num_steps(steps))

    def _num_steps(self, num_inference_steps: int) -> int:
        return max(1, round(self.strength * num_inference_steps))

    @torch.no_grad()
    def answer(
        self, pipeline: Any, captions: Sequence[str], images: Sequence[PIL.Image.Image], generation: Generation
    ) -> Tensor:
        """Return the image before and after the cycles, (B, 2, 64, 64, 3)."""
        conditioning, scheduler = encode_captions(pipeline, captions, guided=True), pipeline.scheduler
        scheduler.set_timesteps(generation.num_inference_steps, device=pipeline.device)
        scale = generation.guidance_scale
        latents = initial_latents(pipeline, len(captions), generation.seed, "cyclic denoising start")
        latents = denoise(pipeline, conditioning, latents, scheduler.timesteps, scale)
        before = decode(pipeline, latents)
        timesteps = scheduler.timesteps[-self._num_steps(generation.num_inference_steps) :]
        for cycle in range(self.num_cycles):
            noise = draw_normal(generation.seed, "cyclic denoising", [(cycle,)], latents.shape[1:]).to(latents)
            steps = timesteps[:1].expand(len(latents))
            latents = scheduler.add_noise(latents, noise.expand_as(latents), steps)
            latents = denoise(pipeline, conditioning, latents, timesteps, scale)
        return torch.stack([before, decode(pipeline, latents)], dim=1)
