"""A search for the prompt embedding that brings out a given image, with a fixed budget."""

from collections.abc import Sequence
from typing import Any, ClassVar

import PIL.Image
import torch
from torch import Tensor

from sd_memguard.audit.attacks.base import Attack, Generation, decode, denoise, initial_latents
from sd_memguard.audit.metrics.signals import encode_captions, encode_images, training_target
from sd_memguard.core.seeding import draw_normal, generator_for


class EmbeddingSearch(Attack):
    """The embedding under which the model denoises an image best, found from the caption's, and one image from it.

    After Kowalczuk et al. 2025, "Finding DoRI: Discovery of Retained Images in Diffusion Models" (ICML 2026, arXiv
    2507.16880), who show by such embeddings that pruned models still hold their images:
    ``min_e E || eps(x_t, e) - n ||^2`` over the hidden states e of the text encoder, the rest of the model fixed. The
    adversary has the image, so what counts is the difference to held-out images: an embedding can describe any image
    to some degree, and the base model shows to which.
    """

    name: ClassVar[str] = "embedding_search"
    title: ClassVar[str] = "prompt-embedding search, 40 steps of 2 noises"
    num_answers: ClassVar[int | None] = 1
    num_attacked: ClassVar[int] = 32
    num_steps: ClassVar[int] = 40
    num_noises: ClassVar[int] = 2
    learning_rate: ClassVar[float] = 0.05

    def evaluations(self, generation: Generation) -> int:
        """Return the cost of one image."""
        return 3 * self.num_steps * self.num_noises + 2 * generation.num_inference_steps

    def answer(
        self, pipeline: Any, captions: Sequence[str], images: Sequence[PIL.Image.Image], generation: Generation
    ) -> Tensor:
        """Return an image for each, (B, 1, 64, 64, 3)."""
        conditioning = encode_captions(pipeline, captions, guided=True)
        found = self._search(pipeline, captions, encode_images(pipeline, images), generation.seed)
        guided = conditioning._replace(states=torch.cat([conditioning.states.chunk(2)[0], found]))
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(generation.num_inference_steps, device=pipeline.device)
        latents = initial_latents(pipeline, len(captions), generation.seed, "embedding search start")
        latents = denoise(pipeline, guided, latents, scheduler.timesteps, generation.guidance_scale)
        return decode(pipeline, latents)[:, None]

    def _search(self, pipeline: Any, captions: Sequence[str], latents: Tensor, seed: int) -> Tensor:
        """Return the embeddings, (B, T, D)."""
        conditioning = encode_captions(pipeline, captions, guided=False)
        states = conditioning.states.detach().float().requires_grad_(True)
        optimizer = torch.optim.Adam([states], lr=self.learning_rate)
        scheduler, dtype = pipeline.scheduler, conditioning.states.dtype
        for number in range(self.num_steps):
            places = [(number, index) for index in range(self.num_noises)]
            noises = draw_normal(seed, "embedding search", places, latents.shape[1:]).to(latents)
            picked = torch.randint(
                scheduler.config.num_train_timesteps,
                (self.num_noises,),
                generator=generator_for(seed, "embedding search timestep", number),
            )
            gradient = torch.zeros_like(states)
            for noise, step in zip(noises, picked.tolist(), strict=True):
                steps = torch.full((len(latents),), step, device=latents.device)
                noise = noise.expand_as(latents)
                noisy = scheduler.add_noise(latents, noise, steps)
                target = training_target(scheduler, latents, noise, steps)
                with torch.enable_grad():
                    given = conditioning._replace(states=states.to(dtype))
                    predicted = pipeline.unet(noisy, steps, **given.arguments()).sample
                    # Summed over images, so that each is searched for as if alone.
                    loss = (predicted - target).float().square().flatten(1).mean(1).sum()
                    gradient += torch.autograd.grad(loss, states)[0]
            states.grad = gradient / self.num_noises
            optimizer.step()
        return states.detach().to(dtype)
