"""Wen's detection as it stands: the norm of what a caption adds to the prediction, over more steps and noises."""

from collections.abc import Sequence
from typing import Any, ClassVar

import PIL.Image
import torch
from torch import Tensor

from sd_memguard.audit.attacks.base import Attack, Generation, initial_latents
from sd_memguard.audit.metrics.signals import encode_captions, noise_scale


class TextSignal(Attack):
    """Mean of ``|| eps(x_t, caption) - eps(x_t, "") ||`` over the first steps of several generations.

    Wen et al. 2024, "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR, arXiv 2407.21720),
    section 4.1: 4 generations for each prompt, and of the steps 1, 10 or 50; here 10. It needs no image, and no step
    beyond those is taken. ``detection`` in the report is the same with 2 steps of 2 generations.
    """

    name: ClassVar[str] = "text_signal"
    title: ClassVar[str] = "Wen's detection, 10 steps, 4 generations"
    num_steps: ClassVar[int] = 10
    num_generations: ClassVar[int] = 4

    def evaluations(self, generation: Generation) -> int:
        """Return the cost of one caption."""
        return 2 * self.num_generations * min(self.num_steps, generation.num_inference_steps)

    @torch.no_grad()
    def answer(
        self, pipeline: Any, captions: Sequence[str], images: Sequence[PIL.Image.Image], generation: Generation
    ) -> Tensor:
        """Return the norm for each caption, (B,)."""
        conditioning, scheduler = encode_captions(pipeline, captions, guided=True), pipeline.scheduler
        norms = []
        for number in range(self.num_generations):
            scheduler.set_timesteps(generation.num_inference_steps, device=pipeline.device)
            latents = initial_latents(pipeline, len(captions), generation.seed, "text signal", number)
            for timestep in scheduler.timesteps[: self.num_steps]:
                both = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
                without, text = pipeline.unet(both, timestep, **conditioning.arguments()).sample.chunk(2)
                difference = text - without
                norms.append(noise_scale(scheduler, timestep) * difference.float().flatten(1).norm(dim=1).cpu())
                predicted = without + generation.guidance_scale * difference
                latents = scheduler.step(predicted, timestep, latents).prev_sample
        return torch.stack(norms).mean(0)
