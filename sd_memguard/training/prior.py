"""Prior preservation: images of the class in general beside every batch, so that the model keeps what it knows.

The loss is that of DreamBooth (arXiv 2208.12242, equation 2): that of the batch, plus ``--prior_loss_weight`` times the
mean over as many class images. The guard does not judge these: they come from the base model or are no secret. So every
proxy trains on all of them, and they enter neither memory bank nor ledger.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from sd_memguard.config import TrainConfig
from sd_memguard.core.sampler import SampleRef, ShardSampler, split_by_bucket
from sd_memguard.core.seeding import derive_seed
from sd_memguard.data.batches import Batch, BatchSource, Encoders, sample_address
from sd_memguard.data.samples import Samples
from sd_memguard.models.pipeline import load_unet, load_vae
from sd_memguard.training.loss import DenoisingLoss, NoiseSampler
from sd_memguard.training.plan import Plan
from sd_memguard.training.ranks import Ranks
from sd_memguard.training.validation import generate_prompts

logger = logging.getLogger(__name__)


ClassBatches = Iterable[tuple[list[SampleRef], Batch]]
"""Batches of class images, each with what it holds."""


def generate_class_images(plan: Plan, accelerator: Accelerator) -> None:
    """Fill the folder of class images with what the model generates before it is trained.

    Each image has a seed of its own, so that a run that was interrupted here goes on with the same images.
    """
    config, pipeline, number = plan.config, plan.pipeline, plan.missing_class_images
    assert config.class_data_dir is not None
    assert config.class_prompt is not None
    folder = Path(config.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("generating %d class images of %r into %s", number, config.class_prompt, folder)
    unet, vae = load_unet(pipeline, config).to(accelerator.device), load_vae(pipeline, config)
    # Whichever are missing: an image that is there is never written over.
    places = range(config.num_class_images)
    free = [place for place in places if not (folder / f"class-{place:05d}.png").exists()][:number]
    images = generate_prompts(
        *(pipeline, unet, vae, [config.class_prompt] * number, accelerator, plan.seed, config.variant),
        purpose="class_image",
        numbers=free,
        side=config.resolutions[-1],
    )
    for place, image in zip(free, tqdm(images, "class images", number, leave=False), strict=True):
        image.save(folder / f"class-{place:05d}.png")


class ClassImages:
    """The class images of a run.

    Args:
        samples: of them.
        encoders: the frozen networks.
        config: of the run.
        seed: of the run.
        num_timesteps: number of timesteps of the noise schedule.
        ranks: who trains what.
    """

    def __init__(
        self, samples: Samples, encoders: Encoders, config: TrainConfig, seed: int, num_timesteps: int, ranks: Ranks
    ) -> None:
        # A seed of their own: they share no draw with the training images of the same number.
        self.seed, self.ranks, self.weight = derive_seed(seed, "class_images"), ranks, config.prior_loss_weight
        self.source = BatchSource(samples, encoders, config, self.seed, progress=ranks.is_main, exchange=ranks.exchange)
        self.noise_sampler = NoiseSampler(self.seed, num_timesteps, config.noise_offset, config.input_perturbation)
        self.members = torch.from_numpy(samples.sample_ids)

    def batches(self, shard_index: int, start: int, count: int, batch_size: int) -> Iterator[ClassBatches]:
        """Yield ``count`` batches from the one with number ``start`` of a shard's proxy: its place is all there is.

        Each comes in parts of one size.
        """
        sampler = ShardSampler(shard_index)
        sampler.advance(start * batch_size, len(self.members))
        upcoming = sampler.batches(self.members, batch_size, self.seed, buckets=self.source.targets.buckets)
        split = [split_by_bucket(chunk) for chunk in islice(upcoming, count)]
        batches = self.source.batches([self.ranks.slice_of(part) for parts in split for part in parts])
        for parts in split:
            yield list(islice(batches, len(parts)))

    def losses(self, model: torch.nn.Module, loss: DenoisingLoss, refs: list[SampleRef], batch: Batch) -> Tensor:
        """Return the denoising loss of each image of a batch, (B,)."""
        addresses = [sample_address(ref) for ref in refs]
        latents, condition, mask = batch
        timesteps, noise, input_noise = self.noise_sampler.sample(addresses, latents.shape[1:], latents.device)
        return loss(model, latents, condition, timesteps, noise, input_noise, mask=mask, dream=False)
