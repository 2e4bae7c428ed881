"""The size at which each image is trained: a square of ``--resolution``, or by ``--enable_bucket`` in its own shape."""

import logging
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sd_memguard.config import TrainConfig
from sd_memguard.core.seeding import generator_for
from sd_memguard.data.samples import Samples
from sd_memguard.errors import ConfigError

logger = logging.getLogger(__name__)

Sizes = npt.NDArray[np.int64]
"""Widths and heights in pixels, (N, 2)."""
MAX_NAMED = 20


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        """Return the size as people write it."""
        return f"{self.width}x{self.height}"


class TargetSizes:
    """The size at which each image is trained, its bucket.

    With several resolutions an image has a bucket for each of them, and an epoch shows it at one: in as many epochs as
    there are resolutions it is seen at each of them once, in an order of its own.

    Args:
        samples: the images.
        config: resolutions and buckets.
        seed: of the turns that resolutions take.

    Attributes:
        sizes: the size of each bucket, ascending.
        table: (num_resolutions, num_rows) int64, the bucket of each sample at each resolution; 0 for unusable ones.
        members: the samples of each bucket, ids ascending.
        need_no_crop: whether every image has the shape of its buckets.

    Raises:
        ConfigError: no bucket lies within the limits.
    """

    def __init__(self, samples: Samples, config: TrainConfig, seed: int) -> None:
        self.samples, self.seed = samples, seed
        ids = samples.sample_ids
        own = samples.sizes[ids].astype(np.int64)
        wanted = [target_sizes(own, resolution, config) for resolution in config.resolutions]
        found, numbers = np.unique(np.concatenate(wanted), axis=0, return_inverse=True)
        self.sizes = [Size(*size) for size in found.tolist()]
        used = numbers.reshape(len(wanted), -1)
        self.table = torch.zeros(len(wanted), samples.num_rows, dtype=torch.int64)
        self.table[:, torch.from_numpy(ids)] = torch.from_numpy(used)
        self.members = [ids[(used == bucket).any(axis=0)] for bucket in range(len(self.sizes))]
        self.need_no_crop = all(bool((own[:, 0] * at[:, 1] == own[:, 1] * at[:, 0]).all()) for at in wanted)
        self._enlarged = ids[np.any([(at > own).any(axis=1) for at in wanted], axis=0)]

    def buckets(self, sample_ids: Tensor, epoch_index: int) -> Tensor:
        """Return the bucket of samples in an epoch of their shard, (B,) int64."""
        num_resolutions, num_rows = self.table.shape
        if num_resolutions == 1:
            return self.table[0, sample_ids]
        block, turn = divmod(epoch_index, num_resolutions)
        chosen = _orders(self.seed, block, num_rows, num_resolutions)[sample_ids, turn]
        return self.table[chosen, sample_ids]

    def places(self, bucket: int, sample_ids: list[int]) -> npt.NDArray[np.int64]:
        """Return where samples are among the members of a bucket, (B,)."""
        return np.searchsorted(self.members[bucket], sample_ids)

    @property
    def counts(self) -> list[int]:
        """Number of images in each bucket; with several resolutions an image may be in several."""
        return [len(members) for members in self.members]

    @property
    def largest(self) -> Size:
        """The size with the most pixels, which needs the most memory."""
        return max(self.sizes, key=lambda size: size.width * size.height)

    def __str__(self) -> str:
        """Return the buckets with their numbers of images, the fullest first."""
        rows = sorted(zip(self.counts, self.sizes, strict=True), key=lambda row: -row[0])
        named = [f"{size} ({count:,})" for count, size in rows[:MAX_NAMED]]
        more = [f"{len(rows) - MAX_NAMED} more"] if len(rows) > MAX_NAMED else []
        return ", ".join([*named, *more])

    def warn_of_enlarged(self) -> None:
        """Name images that ``--bucket_no_upscale`` cannot spare: those with a side below one step."""
        if len(self._enlarged):
            first = int(self._enlarged[0])
            logger.warning(
                "--bucket_no_upscale: %d image(s) have a side shorter than --bucket_reso_steps and are enlarged to it, "
                "the first is %s",
                *(len(self._enlarged), self.samples.file(first)),
            )


def target_sizes(own: Sizes, resolution: int, config: TrainConfig) -> Sizes:
    """Return the size at which each image is trained at one resolution, (N, 2).

    Args:
        own: of the images as they are.
        resolution: side of a square with as many pixels as the largest bucket may have.
        config: the settings of buckets.
    """
    if not config.enable_bucket:
        return np.full_like(own, resolution)
    if config.bucket_no_upscale:
        return _without_enlarging(own, resolution, config)
    options = bucket_sizes(resolution, config)
    shapes = np.log([width / height for width, height in options])
    # Between two shapes the middle decides which is nearer: on the scale where 2:1 is as far from a square as 1:2.
    middles = [(one + other) / 2 for one, other in pairwise(shapes)]
    return np.array(options)[np.searchsorted(middles, np.log(own[:, 0] / own[:, 1]))]


def bucket_sizes(resolution: int, config: TrainConfig) -> list[Size]:
    """Return the buckets of a resolution from the narrowest to the widest: no two of one shape, in steps.

    For each side from the least to the greatest one, the other side is as long as the number of pixels allows.

    Raises:
        ConfigError: none lies within the limits.
    """
    step, (low, high) = config.bucket_reso_steps, bucket_limits(resolution, config)
    found = {Size(resolution // step * step, resolution // step * step)}
    for side in range(-(-low // step) * step, high + 1, step):
        other = min(resolution**2 // side, high) // step * step
        found |= {Size(side, other), Size(other, side)}
    within = [size for size in found if low <= min(size) and max(size) <= high and min(size) > 0]
    by_shape: dict[float, Size] = {}
    for size in sorted(within, key=lambda size: size.width * size.height):
        by_shape[size.width / size.height] = size  # of one shape, the largest
    if not by_shape:
        raise ConfigError(
            f"`--enable_bucket` finds no size of {resolution}x{resolution} pixels whose sides are multiples of "
            f"`--bucket_reso_steps` {step} between {low} and {high}; lower `--bucket_reso_steps`, or widen "
            "`--min_bucket_reso` and `--max_bucket_reso`"
        )
    return [by_shape[shape] for shape in sorted(by_shape)]


def bucket_limits(resolution: int, config: TrainConfig) -> tuple[int, int]:
    """Return the shortest and the longest side of a bucket: as set, else half and twice the resolution."""
    return config.min_bucket_reso or resolution // 2, config.max_bucket_reso or 2 * resolution


def _without_enlarging(own: Sizes, resolution: int, config: TrainConfig) -> Sizes:
    """Return for each image its own size, made smaller where it has too many pixels, in whole steps."""
    step, (_, high) = config.bucket_reso_steps, bucket_limits(resolution, config)
    # The sides of an image of the same shape with as many pixels as the resolution has.
    full = np.sqrt(resolution**2 * own / own[:, ::-1])
    sides = np.minimum(np.minimum(own, full), high)
    return np.maximum((sides // step).astype(np.int64), 1) * step


@lru_cache(maxsize=4)
def _orders(seed: int, block: int, num_rows: int, num_resolutions: int) -> Tensor:
    """Return in which order each sample takes its resolutions in a block of as many epochs, (rows, resolutions)."""
    draws = torch.rand(num_rows, num_resolutions, generator=generator_for(seed, "resolution", block))
    return draws.argsort(dim=1, stable=True)
