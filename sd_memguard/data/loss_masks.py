"""Masks as the loss takes them: under the crop, flip and affine map of their image, in the size of latents."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from PIL.Image import Image
from torch import Tensor

from sd_memguard.core.seeding import Address
from sd_memguard.data.samples import Samples
from sd_memguard.data.transforms import Preprocess

logger = logging.getLogger(__name__)


class LossMasks:
    """Which part of each latent counts, from 0 to 1.

    Args:
        samples: the images.
        preprocess: what is done with an image of each bucket, and alike with its mask.
        factor: by which the VAE shrinks a side; an element of a latent counts by the mean of its pixels.

    Attributes:
        keeps: whether masks are kept once they are made, a byte for each element of a latent: where the crop of an
            image is the same every time.
    """

    def __init__(self, samples: Samples, preprocess: Sequence[Preprocess], factor: int) -> None:
        self.samples, self.preprocess, self.factor = samples, preprocess, factor
        self.keeps = False
        self._kept: dict[tuple[int, int, int], Tensor | None] = {}
        self._outside: set[int] = set()
        self._pool = None if samples.masked is None else ThreadPoolExecutor()

    def at(
        self, sample_ids: Sequence[int], addresses: Sequence[Address], keys: Sequence[bytes], bucket: int = 0
    ) -> list[Tensor | None]:
        """Return the mask of each sample of a bucket at its address, (1, h, w) uint8, None where all of it counts."""
        assert self._pool is not None
        preprocess = self.preprocess[bucket]
        if self.keeps:
            views = preprocess.choose_views(list(addresses)).tolist()
            return list(self._pool.map(self._kept_mask, sample_ids, views, keys, [bucket] * len(views)))
        return list(
            self._pool.map(
                lambda sample_id, address, key: self._made(sample_id, lambda mask: preprocess(mask, key, address)),
                *(sample_ids, addresses, keys),
            )
        )

    def fixed(self, sample_ids: Sequence[int], bucket: int = 0) -> list[Tensor | None]:
        """Return the masks of images that are seen without chance; one that is outside of the crop counts for none."""
        if self._pool is None:
            return [None] * len(sample_ids)
        masks = [self._made(sample_id, self.preprocess[bucket].fixed) for sample_id in sample_ids]
        return [None if mask is None or not mask.any() else mask for mask in masks]

    def shown(self, sample_ids: Sequence[int], masks: Sequence[Tensor | None]) -> list[int]:
        """Return the positions of samples of which something counts; the others are named, each once."""
        positions = []
        for position, (sample_id, mask) in enumerate(zip(sample_ids, masks, strict=True)):
            if mask is None or mask.any():
                positions.append(position)
            elif sample_id not in self._outside:
                self._outside.add(sample_id)
                logger.warning(
                    "sample %d, %s: its mask is outside of a crop; the run goes on without it there",
                    *(sample_id, self.samples.file(sample_id)),
                )
        return positions

    def _kept_mask(self, sample_id: int, view: int, key: bytes, bucket: int) -> Tensor | None:
        place = (sample_id, view, bucket)
        if place not in self._kept:
            preprocess = self.preprocess[bucket]
            self._kept[place] = self._made(
                sample_id, lambda mask: preprocess.centered(mask, key, preprocess.views[view])
            )
        return self._kept[place]

    def _made(self, sample_id: int, place: Callable[[Image], Tensor]) -> Tensor | None:
        mask = self.samples.mask(sample_id)
        if mask is None:
            return None
        shares = F.avg_pool2d((place(mask) + 1) / 2, self.factor)
        return (255 * shares).round().to(torch.uint8)


def stacked(masks: Sequence[Tensor | None], latents: Tensor) -> Tensor | None:
    """Return the masks of a batch from 0 to 1, (B, 1, h, w) float32, None where all of all images counts."""
    if all(mask is None for mask in masks):
        return None
    whole = torch.full((1, *latents.shape[2:]), 255, dtype=torch.uint8)
    rows = torch.stack([whole if mask is None else mask for mask in masks])
    return rows.to(latents.device).float() / 255
