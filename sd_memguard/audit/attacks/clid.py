"""Membership by CLiD: how much better the caption explains an image than less of the caption does."""

from collections.abc import Sequence
from typing import Any, ClassVar

import PIL.Image
import torch
from torch import Tensor

from sd_memguard.audit.attacks.base import Attack, Generation
from sd_memguard.audit.metrics.signals import (
    LOSS_TIMESTEPS,
    Conditioning,
    encode_captions,
    encode_images,
    training_target,
)
from sd_memguard.core.seeding import draw_normal


class Clid(Attack):
    """Conditional likelihood discrepancy.

    Zhai et al. 2024, "Membership Inference on Text-to-image Diffusion Models via Conditional Likelihood Discrepancy"
    (NeurIPS, arXiv 2405.14800): ``D = mean over t, n, c* of || eps(x_t, c*) - n ||^2 - || eps(x_t, c) - n ||^2`` where
    c is the caption and c* are reductions of it. Models overfit to images given their captions more than to images, so
    D is larger for images that were trained on. The reductions here are the first two thirds and the first third of the
    caption's words, and the empty caption. The paper's variants also weigh in the loss, or train a classifier on all
    terms with images known to be members; here D alone decides, with no such knowledge.
    """

    name: ClassVar[str] = "clid"
    title: ClassVar[str] = "CLiD"
    num_noises: ClassVar[int] = 2

    def evaluations(self, generation: Generation) -> int:
        """Return the cost of one image."""
        return 4 * self.num_noises * len(LOSS_TIMESTEPS)

    @torch.no_grad()
    def answer(
        self, pipeline: Any, captions: Sequence[str], images: Sequence[PIL.Image.Image], generation: Generation
    ) -> Tensor:
        """Return the discrepancy of each image, (B,)."""
        texts = [list(captions)] + [[shortened(caption, thirds) for caption in captions] for thirds in (2, 1, 0)]
        conditionings = [encode_captions(pipeline, text, guided=False) for text in texts]
        latents = encode_images(pipeline, images)
        total = torch.zeros(len(captions))
        for level, share in enumerate(LOSS_TIMESTEPS):
            step = int(share * pipeline.scheduler.config.num_train_timesteps)
            steps = torch.full((len(latents),), step, device=pipeline.device)
            places = [(level, number) for number in range(self.num_noises)]
            for noise in draw_normal(generation.seed, "clid", places, latents.shape[1:]).to(latents):
                noise = noise.expand_as(latents)
                noisy = pipeline.scheduler.add_noise(latents, noise, steps)
                target = training_target(pipeline.scheduler, latents, noise, steps)
                whole, *reduced = (_errors(pipeline, noisy, steps, target, one) for one in conditionings)
                total += torch.stack(reduced).mean(0) - whole
        return total / (len(LOSS_TIMESTEPS) * self.num_noises)


def shortened(caption: str, thirds: int) -> str:
    """Return the first so many thirds of a caption's words, rounded down."""
    words = caption.split()
    return " ".join(words[: len(words) * thirds // 3])


def _errors(pipeline: Any, noisy: Tensor, steps: Tensor, target: Tensor, conditioning: Conditioning) -> Tensor:
    predicted = pipeline.unet(noisy, steps, **conditioning.arguments()).sample
    return (predicted - target).float().square().flatten(1).mean(1).cpu()
