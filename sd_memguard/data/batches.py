"""From samples to tensors: images become latents and captions embeddings, once in a cache or every time."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sd_memguard.config import TrainConfig
from sd_memguard.core.async_copy import to_device
from sd_memguard.core.sampler import SampleRef
from sd_memguard.core.seeding import Address, draw_normal
from sd_memguard.data.captions import Captions
from sd_memguard.data.encoding_cache import Cache, embedding_cache, latent_caches
from sd_memguard.data.loss_masks import LossMasks, stacked
from sd_memguard.data.samples import Samples
from sd_memguard.data.target_sizes import TargetSizes
from sd_memguard.data.transforms import PixelDataset, Preprocess, sample_address
from sd_memguard.distributed import ProcessGroup
from sd_memguard.models.encoders import Encoders
from sd_memguard.models.kinds import Condition

__all__ = ["NOTHING", "AugmentedCopy", "Batch", "BatchSource", "Encoders", "sample_address"]

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What one forward takes, float32 on the device: scaled latents (B, C, h, w), and the condition of the UNet.

    The mask (B, 1, h, w) says from 0 to 1 how much of each element counts in the loss; None: all of all images.
    """

    latents: Tensor
    condition: Condition
    mask: Tensor | None = None


class AugmentedCopy(NamedTuple):
    """A sample to train from an augmented copy: the address of its random numbers, and its bucket."""

    sample_id: int
    address: Address
    bucket: int = 0


NOTHING = Batch(torch.empty(0), Condition(torch.empty(0)))
"""The batch of no samples."""


class BatchSource:
    """Makes batches of samples.

    Args:
        samples: the captioned images.
        encoders: the frozen networks.
        config: preprocessing, caption dropout, workers and caches.
        seed: seed of the run.
        progress: whether to show a bar while the caches are filled.
        cache: whether there are caches at all.
        num_samples_seen: of the whole run, where known: images that are seen less often than encoded are not kept.
        exchange: the processes that fill them together; by default this one.
    """

    def __init__(
        self,
        samples: Samples,
        encoders: Encoders,
        config: TrainConfig,
        seed: int,
        *,
        progress: bool = False,
        cache: bool = True,
        num_samples_seen: int | None = None,
        exchange: ProcessGroup | None = None,
    ) -> None:
        self.samples, self.encoders, self.seed, self.config = samples, encoders, seed, config
        self.targets = TargetSizes(samples, config, seed)
        self.preprocess = [Preprocess(config, seed, size) for size in self.targets.sizes]
        self.pixels = PixelDataset(samples, self.preprocess)
        self.lost: set[int] = set()
        self.captions = Captions(samples, config, seed)
        self._latents: list[list[Cache]] = []
        self._embeddings: Cache | None = None
        self.masks = LossMasks(samples, self.preprocess, encoders.moments_shape[1])
        if cache:
            crew = ProcessGroup(alone=True) if exchange is None else exchange
            self._latents = latent_caches(
                self.targets,
                encoders,
                self.preprocess,
                config,
                crew,
                num_samples_seen=num_samples_seen,
                progress=progress,
            )
            self.masks.keeps = self.caches_latents
            self._embeddings = embedding_cache(self.captions, encoders, config, crew, progress=progress)

    def batches(self, refs: Iterable[list[SampleRef]]) -> Iterator[tuple[list[SampleRef], Batch]]:
        """Yield the batch of each list of samples, which have one bucket, and the samples in it.

        An image that was good when it was checked and cannot be read now is named once and dropped from its batches;
        a batch may even be empty then. So may one in which no crop shows anything of its image's mask.
        """
        if self.caches_latents:
            for chunk in refs:
                positions, masks = self._shown(chunk)
                present = [chunk[position] for position in positions]
                yield present, self._batch(present, self._cached_moments(present), masks) if present else NOTHING
            return
        chunks = list(refs)
        loader = DataLoader(
            self.pixels,
            batch_sampler=chunks,
            num_workers=self.config.dataloader_num_workers,
            collate_fn=list,
            pin_memory=self.encoders.device.type == "cuda",
            generator=torch.Generator(),  # else the loader takes its workers' seed from the global generator
        )
        for chunk, pixels in zip(chunks, loader, strict=True):
            readable = self._readable([ref.sample_id for ref in chunk], pixels)
            positions, masks = self._shown([chunk[position] for position in readable])
            kept = [readable[position] for position in positions]
            present = [chunk[position] for position in kept]
            yield present, self._batch(present, self._moments_at(kept, pixels), masks) if kept else NOTHING

    def augmented(self, copies: Sequence[AugmentedCopy], bucket: int, magnitude: int) -> tuple[list[Address], Batch]:
        """Return a batch of augmented copies, all of one bucket, and the addresses of those that could be read.

        Nothing of it comes from a cache of images or enters one.
        """
        ids, addresses = [copy.sample_id for copy in copies], [copy.address for copy in copies]
        pixels = [self.pixels.read(*one, bucket, magnitude) for one in zip(ids, addresses, strict=True)]
        kept = self._readable(ids, pixels)
        if not kept:
            return [], NOTHING
        ids, present = [ids[position] for position in kept], [addresses[position] for position in kept]
        return present, self._sampled(ids, present, self._moments_at(kept, pixels), bucket, purpose="augment_")

    def _readable(self, sample_ids: list[int], pixels: list[Tensor | str]) -> list[int]:
        """Return the positions of the images that could be read, and name the others, each once."""
        for sample_id, image in zip(sample_ids, pixels, strict=True):
            if isinstance(image, str) and sample_id not in self.lost:
                self.lost.add(sample_id)
                logger.warning("%s; the run goes on without it", image)
        return [position for position, image in enumerate(pixels) if isinstance(image, Tensor)]

    def _shown(self, refs: list[SampleRef]) -> tuple[list[int], list[Tensor | None]]:
        """Return the positions of the samples of which something counts, and the masks of these."""
        if self.samples.masked is None or not refs:
            return list(range(len(refs))), [None] * len(refs)
        ids = [ref.sample_id for ref in refs]
        masks = self.masks.at(ids, [sample_address(ref) for ref in refs], self._keys(ids), refs[0].bucket)
        positions = self.masks.shown(ids, masks)
        return positions, [masks[position] for position in positions]

    def _moments_at(self, positions: list[int], pixels: list[Any]) -> Tensor:
        return self.encoders.moments(torch.stack([pixels[position] for position in positions]))

    def fixed(self, sample_ids: list[int], bucket: int = 0) -> Batch:
        """Return a batch without chance: center crop, no flip, the mean latent and the first caption."""
        preprocess = self.preprocess[bucket]
        pixels = torch.stack([preprocess.fixed(self.samples.image(sample_id)) for sample_id in sample_ids])
        captions = [self.captions.first(sample_id) for sample_id in sample_ids]
        condition = self._condition(sample_ids, [None] * len(sample_ids), captions, bucket)
        latents = self.encoders.latents(self.encoders.moments(pixels).float())
        return Batch(latents, condition, stacked(self.masks.fixed(sample_ids, bucket), latents))

    @property
    def caches_latents(self) -> bool:
        """Whether latents come from a cache, so that the VAE is left to augmented copies."""
        return bool(self._latents)

    @property
    def caches_embeddings(self) -> bool:
        """Whether text embeddings come from a cache, so that the text encoder has nothing left to do."""
        return self._embeddings is not None

    def _batch(self, refs: list[SampleRef], moments: Tensor, masks: list[Tensor | None]) -> Batch:
        ids, addresses = [ref.sample_id for ref in refs], [sample_address(ref) for ref in refs]
        batch = self._sampled(ids, addresses, moments, refs[0].bucket)
        return batch._replace(mask=stacked(masks, batch.latents))

    def _sampled(
        self, sample_ids: list[int], addresses: list[Address], moments: Tensor, bucket: int, purpose: str = ""
    ) -> Batch:
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        noise = to_device(draw_normal(self.seed, f"{purpose}latent", addresses, shape), moments.device)
        captions = [self.captions(sample_id, address) for sample_id, address in zip(sample_ids, addresses, strict=True)]
        condition = self._condition(sample_ids, addresses, captions, bucket)
        return Batch(self.encoders.latents(moments.float(), noise), condition)

    def _condition(
        self, sample_ids: list[int], addresses: Sequence[Address | None], captions: list[int], bucket: int
    ) -> Condition:
        """Return what the UNet takes of captions, and of sizes where it is told those."""
        sizes = None
        if self.encoders.kind.takes_sizes:
            extents, keys = self.samples.sizes[sample_ids].tolist(), self._keys(sample_ids)
            rows = [
                self.preprocess[bucket].sizes(width, height, key, address)
                for (width, height), key, address in zip(extents, keys, addresses, strict=True)
            ]
            sizes = torch.tensor(rows)
        return self.encoders.condition(self._embed(captions, addresses), sizes)

    def _keys(self, sample_ids: list[int]) -> list[bytes]:
        """Return the hashes of files, by which affine maps are chosen; empty ones where there are none."""
        if not self.config.random_affine:
            return [b""] * len(sample_ids)
        rows = np.searchsorted(self.samples.sample_ids, sample_ids)
        # numpy drops zeros at the end.
        return [key.ljust(16, b"\0") for key in self._content_keys[rows].tolist()]

    @cached_property
    def _content_keys(self) -> npt.NDArray[np.bytes_]:
        return self.samples.content_keys()

    def _embed(self, captions: list[int], addresses: Sequence[Address | None]) -> Tensor:
        if self._embeddings is None:
            seen = zip(captions, addresses, strict=True)
            return self.encoders.embeddings([self.captions.text(*caption) for caption in seen]).float()
        return to_device(self._embeddings.read(np.array(captions)), self.encoders.device).float()

    def _cached_moments(self, refs: list[SampleRef]) -> Tensor:
        bucket = refs[0].bucket
        caches, rows = self._latents[bucket], self.targets.places(bucket, [ref.sample_id for ref in refs])
        if len(caches) == 1:
            return to_device(caches[0].read(rows), self.encoders.device)
        views = self.preprocess[bucket].choose_views([sample_address(ref) for ref in refs]).numpy()
        moments = torch.cat([cache.read(rows[views == view]) for view, cache in enumerate(caches)])
        order = np.argsort(np.concatenate([np.flatnonzero(views == view) for view in range(len(caches))]))
        return to_device(moments[torch.from_numpy(order)], self.encoders.device)
