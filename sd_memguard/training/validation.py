"""The model while it trains: its loss on training and on held-out images, and images that it generates."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL.Image import Image
from torch import Tensor, nn

from sd_memguard.core.seeding import Address, derive_seed, draw_normal, draw_uniform, permutation
from sd_memguard.data.batches import Batch, BatchSource, Encoders
from sd_memguard.models.pipeline import kind_of, load_vae
from sd_memguard.training.loss import DenoisingLoss
from sd_memguard.training.plan import Plan, held_back_ids, image_ids
from sd_memguard.training.progress_log import RunLog
from sd_memguard.training.ranks import Ranks
from sd_memguard.training.run_state import RunState

MAX_IMAGES = 128
TIMESTEPS_PER_IMAGE = 4
NUM_INFERENCE_STEPS = 20


class MeanLoss(NamedTuple):
    """A mean over images with its standard error."""

    mean: float
    standard_error: float


class LossProbe:
    """The denoising loss on fixed images at fixed timesteps with fixed noise, so that only the model changes it.

    Of each image (at most 128, chosen by the seed) four timesteps are taken, one from each quarter of the schedule, and
    of fewer images as many more that there are about as many losses. An image is measured in its bucket, with several
    resolutions at one of them.

    Args:
        source: makes the batches.
        seed: seed of the run.
        num_timesteps: number of timesteps of the schedule.
        batch_size: images per forward.
        sample_ids: (n,) int64, the images to choose from; by default all that the source has.
    """

    def __init__(
        self, source: BatchSource, seed: int, num_timesteps: int, batch_size: int, sample_ids: Tensor | None = None
    ) -> None:
        ids = torch.from_numpy(source.samples.sample_ids) if sample_ids is None else sample_ids
        chosen = ids[permutation(seed, "probe", length=len(ids))[:MAX_IMAGES]].sort().values
        self.num_parts = TIMESTEPS_PER_IMAGE * max(MAX_IMAGES // max(len(chosen), 1), 1)
        buckets = source.targets.buckets(chosen, 0)
        self.batches = [
            (chunk.tolist(), source.fixed(chunk.tolist(), bucket))
            for bucket in buckets.unique().tolist()
            for chunk in chosen[buckets == bucket].split(batch_size)
        ]
        self.seed, self.num_timesteps = seed, num_timesteps

    @torch.no_grad()
    def measure(self, unet: nn.Module, loss: DenoisingLoss) -> MeanLoss:
        """Return the mean loss of the UNet as it is."""
        was_training = unet.training
        unet.eval()
        per_image = torch.cat([self._losses(unet, loss, ids, batch) for ids, batch in self.batches]).double()
        unet.train(was_training)
        spread = float(per_image.std()) if len(per_image) > 1 else math.nan
        return MeanLoss(float(per_image.mean()), spread / math.sqrt(len(per_image)))

    def _losses(self, unet: nn.Module, loss: DenoisingLoss, ids: list[int], batch: Batch) -> Tensor:
        latents, condition, mask = batch
        total = torch.zeros(len(ids))
        for part in range(self.num_parts):
            addresses: list[Address] = [(sample_id, part) for sample_id in ids]
            quarter = part % TIMESTEPS_PER_IMAGE
            place = (draw_uniform(self.seed, "probe_timestep", addresses) + quarter) / TIMESTEPS_PER_IMAGE
            timesteps = (place * self.num_timesteps).long().to(latents.device)
            noise = draw_normal(self.seed, "probe_noise", addresses, latents.shape[1:]).to(latents.device)
            total += loss(unet, latents, condition, timesteps, noise, mask=mask, dream=False).cpu()
        return total / self.num_parts


@torch.no_grad()
def generate_prompts(
    folder: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    prompts: list[str],
    accelerator: Accelerator,
    seed: int,
    variant: str | None,
    *,
    purpose: str = "validation_generated_image",
    numbers: Iterable[int] | None = None,
    side: int | None = None,
) -> Iterator[Image]:
    """Yield one generated image for each prompt with the present UNet, 20 steps at the pipeline's own guidance.

    The seed of a generated image is its own, so that one prompt more or less changes no other generated image.

    Args:
        folder: of the pipeline.
        unet: generates.
        vae: decodes.
        prompts: one for each image.
        accelerator: device and precision.
        seed: of the run.
        variant: of the files of the pipeline.
        purpose: with the number of an image this gives its seed.
        numbers: of the images; 0, 1, 2 ... by default.
        side: of the square images in pixels; the model's own by default.
    """
    was_training = unet.training
    unet.eval()
    kind = kind_of(folder)
    pipeline = kind.pipeline.from_pretrained(
        folder, unet=unet, vae=vae, use_safetensors=True, variant=variant, **kind.loading
    ).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    for number, prompt in zip(range(len(prompts)) if numbers is None else numbers, prompts, strict=True):
        generator = torch.Generator().manual_seed(derive_seed(seed, purpose, number))
        with accelerator.autocast():
            latents = pipeline(
                prompt,
                height=side,
                width=side,
                num_inference_steps=NUM_INFERENCE_STEPS,
                generator=generator,
                output_type="latent",
            ).images
        # Not under autocast: the activations of SDXL's VAE overflow in fp16.
        yield pipeline.image_processor.postprocess(vae.decode(latents.float() / vae.config.scaling_factor).sample)[0]
    unet.train(was_training)


class RoundValidator:
    """Measures the loss of the aggregate and generates with it at the end of a round, on the main process.

    Args:
        plan: what the run does.
        source: makes the batches of the training images.
        encoders: the frozen networks, for those of the held-out ones.
        num_timesteps: number of timesteps of the noise schedule.
        is_main: whether this process is the one that looks.
    """

    def __init__(
        self, plan: Plan, source: BatchSource, encoders: Encoders, num_timesteps: int, *, is_main: bool
    ) -> None:
        self.plan, self.config = plan, plan.config
        self.probes: dict[str, LossProbe] = {}
        if not (is_main and plan.measures_heldout_loss):
            return
        held_back = held_back_ids(plan.guard, plan.samples)
        is_trained = ~torch.isin(torch.from_numpy(image_ids(plan.samples)), held_back)
        trained = torch.from_numpy(plan.samples.sample_ids)[is_trained]
        heldout = (source, held_back)
        if plan.heldout is not None:
            folder = BatchSource(plan.heldout, encoders, self.config, plan.seed, cache=False)
            heldout = (folder, torch.from_numpy(plan.heldout.sample_ids))
        self.probes = {
            name: LossProbe(images, plan.seed, num_timesteps, self.config.train_batch_size, chosen)
            for name, (images, chosen) in {"train_loss": (source, trained), "heldout_loss": heldout}.items()
        }

    @property
    def prompts(self) -> list[str]:
        """The prompts to generate from: those of the plan once each, ``--validation_prompt`` several times."""
        config = self.config
        repeated = [config.validation_prompt] * (config.num_validation_images or 0) if config.validation_prompt else []
        return [*self.plan.prompts, *repeated]

    def before_training(self, state: RunState, ranks: Ranks, loss: DenoisingLoss) -> dict[str, float]:
        """Return the probes' mean losses of the model as it is before the first step; all processes call it."""
        if not self.plan.measures_heldout_loss:
            return {}
        with torch.compiler.set_stance("force_eager"):
            measured = {name: probe.measure(state.unet, loss).mean for name, probe in self.probes.items()}
        losses: dict[str, float] = ranks.exchange.broadcast_object(measured, "loss before training")
        return losses

    def at_round_end(self, state: RunState, ranks: Ranks, loss: DenoisingLoss, log: RunLog) -> dict[str, MeanLoss]:
        """Return the probes' losses of the aggregate, and generate with it when that is due.

        All processes call it: they share the proxies, or the store where these rest.
        """
        generates = self._generation_is_due(state)
        if not (generates or self.plan.measures_heldout_loss):
            return {}
        # Not compiled: these few forwards are not worth another compilation.
        with state.ensemble.averaged(), torch.compiler.set_stance("force_eager"):
            if generates and ranks.is_main:
                self._generate(state, log)
            measured = {name: probe.measure(state.unet, loss) for name, probe in self.probes.items()}
        # All of them know whether this is the best round, and when to stop.
        losses: dict[str, MeanLoss] = ranks.exchange.broadcast_object(measured, "held-out loss")
        return losses

    def _generation_is_due(self, state: RunState) -> bool:
        """Say whether a multiple of ``--validation_epochs`` epochs was completed, or the first or last round ends."""
        if not self.prompts:
            return False
        progress, rounds, per_epoch = state.ensemble.progress, state.ensemble.rounds, self.plan.epoch_length
        done = progress.global_step * self.plan.effective_batch_size // per_epoch
        steps_before = rounds[-1]["global_step"] if rounds else 0
        before, every = steps_before * self.plan.effective_batch_size // per_epoch, self.config.validation_epochs
        last = self.plan.schedule.num_rounds - 1
        return done // every > before // every or progress.round_index in {0, last}

    def _generate(self, state: RunState, log: RunLog) -> None:
        folder, variant, seed = self.plan.pipeline, self.config.variant, self.plan.seed
        vae = load_vae(folder, self.config)
        images = list(generate_prompts(folder, state.unet, vae, self.prompts, log.accelerator, seed, variant))
        log.generated(images, state.ensemble.progress.global_step)
