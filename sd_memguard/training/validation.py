"""Looking at the model while it trains: its loss on pictures it trains on and on unseen ones, and its drawings."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL.Image import Image
from torch import Tensor, nn

from sd_memguard.core.seeding import Address, derive_seed, draw_normal, draw_uniform, permutation
from sd_memguard.training.batches import BatchSource
from sd_memguard.training.loss import DenoisingLoss

MAX_PICTURES = 128
TIMESTEPS_PER_PICTURE = 4
NUM_INFERENCE_STEPS = 20


class MeanLoss(NamedTuple):
    """A mean over pictures with its standard error."""

    mean: float
    standard_error: float


class LossProbe:
    """The denoising loss on fixed pictures at fixed timesteps with fixed noise, so that only the model changes it.

    Of each picture (at most 128, drawn by the seed) four timesteps are taken, one from each quarter of the schedule.

    Args:
        source: makes the batches.
        seed: seed of the run.
        num_timesteps: number of timesteps of the schedule.
        batch_size: pictures per forward.
    """

    def __init__(self, source: BatchSource, seed: int, num_timesteps: int, batch_size: int) -> None:
        ids = torch.from_numpy(source.samples.sample_ids)
        chosen = ids[permutation(seed, "probe", length=len(ids))[:MAX_PICTURES]].sort().values
        self.batches = [(chunk.tolist(), source.fixed(chunk.tolist())) for chunk in chosen.split(batch_size)]
        self.seed, self.num_timesteps = seed, num_timesteps

    @torch.no_grad()
    def measure(self, unet: nn.Module, loss: DenoisingLoss) -> MeanLoss:
        """Return the mean loss of the UNet as it is."""
        was_training = unet.training
        unet.eval()
        per_picture = torch.cat([self._losses(unet, loss, ids, *batch) for ids, batch in self.batches]).double()
        unet.train(was_training)
        spread = float(per_picture.std()) if len(per_picture) > 1 else math.nan
        return MeanLoss(float(per_picture.mean()), spread / math.sqrt(len(per_picture)))

    def _losses(
        self, unet: nn.Module, loss: DenoisingLoss, ids: list[int], latents: Tensor, embeddings: Tensor
    ) -> Tensor:
        total = torch.zeros(len(ids))
        for part in range(TIMESTEPS_PER_PICTURE):
            addresses: list[Address] = [(sample_id, part) for sample_id in ids]
            place = (draw_uniform(self.seed, "probe_timestep", addresses) + part) / TIMESTEPS_PER_PICTURE
            timesteps = (place * self.num_timesteps).long().to(latents.device)
            noise = draw_normal(self.seed, "probe_noise", addresses, latents.shape[1:]).to(latents.device)
            total += loss(unet, latents, embeddings, timesteps, noise, dream=False).cpu()
        return total / TIMESTEPS_PER_PICTURE


@torch.no_grad()
def draw_prompts(
    folder: Path,
    unet: UNet2DConditionModel,
    prompts: list[str],
    accelerator: Accelerator,
    seed: int,
    variant: str | None,
) -> list[Image]:
    """Return one drawing for each prompt with the present UNet, 20 steps at the pipeline's own guidance.

    The seed of a drawing is its own, so that one prompt more or less changes no other drawing.
    """
    was_training = unet.training
    unet.eval()
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, unet=unet, safety_checker=None, requires_safety_checker=False, use_safetensors=True, variant=variant
    ).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    with accelerator.autocast():
        for position, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(derive_seed(seed, "validation_drawing", position))
            images.append(pipeline(prompt, num_inference_steps=NUM_INFERENCE_STEPS, generator=generator).images[0])
    unet.train(was_training)
    return images
