"""The order in which a shard's samples are seen, and the sampler that remembers where it stands."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from sd_memguard.core.seeding import generator_for, permutation

BucketsOf = Callable[[Tensor, int], Tensor]
"""Returns the buckets of samples (B,) in an epoch, (B,) int64: what may share a batch has the same number."""


class SampleRef(NamedTuple):
    """One sample in one epoch of its shard: the address of every random number for it, and its bucket there."""

    sample_id: int
    shard_index: int
    epoch_index: int
    bucket: int = 0


class Bucketed(Protocol):
    """What has a bucket."""

    @property
    def bucket(self) -> int:
        """Its number."""


Item = TypeVar("Item", bound=Bucketed)


@dataclass
class ShardSampler:
    """Where a shard stands in its epochs.

    The order of an epoch is ``permutation(seed, shard, epoch)`` of the shard's members, or of its groups of duplicates
    where those count as one image each, so this pair is all there is to save. An epoch number is never used twice: a
    change of membership begins the next epoch.
    """

    shard_index: int
    epoch_index: int = 0
    position: int = 0

    def peek(self, members: Tensor, count: int, seed: int, groups: Tensor | None = None) -> list[SampleRef]:
        """Return the next ``count`` samples without moving on; a new epoch begins where one ends.

        Args:
            members: (size,) int64, the sample ids of the shard.
            count: number of samples.
            seed: seed of the run.
            groups: (size,) int64, where an epoch shows one member of each group: the next one from epoch to epoch,
                so that in as many epochs as it has members each is seen once.
        """
        return next(self.batches(members, count, seed, groups)) if count else []

    def batches(
        self,
        members: Tensor,
        batch_size: int,
        seed: int,
        groups: Tensor | None = None,
        buckets: BucketsOf | None = None,
    ) -> Iterator[list[SampleRef]]:
        """Yield batches from here on, without end and without moving on; see ``peek``.

        With buckets the order of an epoch is that of ``group_batches``; the sampler must stand at the end of a batch of
        this size then.
        """
        epoch_index, start, batch = self.epoch_index, self.position, list[SampleRef]()
        while True:
            shown = members if groups is None else self._choose_members(members, groups, epoch_index, seed)
            shown = shown[permutation(seed, "order", self.shard_index, epoch_index, length=len(shown))]
            numbers = torch.zeros_like(shown) if buckets is None else buckets(shown, epoch_index)
            order = group_batches(numbers, batch_size, (start - len(batch)) % batch_size)[start:]
            for sample_id, bucket in zip(shown[order].tolist(), numbers[order].tolist(), strict=True):
                batch.append(SampleRef(sample_id, self.shard_index, epoch_index, bucket))
                if len(batch) == batch_size:
                    yield batch
                    batch = []
            epoch_index, start = epoch_index + 1, 0

    def _choose_members(self, members: Tensor, groups: Tensor, epoch_index: int, seed: int) -> Tensor:
        """Return one member of each group, (num_groups,) int64."""
        _, inverse, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
        by_group = members[torch.argsort(inverse, stable=True)]
        starts = torch.cumsum(sizes, 0) - sizes
        # The first one is random, the others follow in turn.
        generator = generator_for(seed, "duplicate", self.shard_index)
        first = (torch.rand(len(sizes), generator=generator, dtype=torch.float64) * sizes).long()
        return by_group[starts + (first + epoch_index) % sizes]

    def advance(self, count: int, epoch_length: int) -> None:
        """Move on by ``count`` samples in epochs of this length: the number of members, or of groups."""
        epochs, self.position = divmod(self.position + count, epoch_length)
        self.epoch_index += epochs

    def begin_epoch(self) -> None:
        """Begin the next epoch because the members of the shard have changed."""
        self.epoch_index += 1
        self.position = 0


def group_batches(buckets: Tensor, batch_size: int, head: int = 0) -> Tensor:
    """Return an order of the samples of an epoch, (N,) int64, in which batches hold one bucket, as far as that goes.

    Each sample, in the order that is given, joins the batch of its bucket, and a batch comes when it is full. What is
    left of the buckets comes at the end, bucket by bucket: batches of several buckets, so that every batch is full and
    each sample comes once. Samples of one bucket stay in their order.

    Args:
        buckets: (N,) int64, the bucket of each sample.
        batch_size: samples of a batch.
        head: number of samples at the beginning that complete the last batch of the epoch before; they are taken from
            what would be left.
    """
    if int(buckets.min()) == int(buckets.max()):
        return torch.arange(len(buckets))
    ahead = _choose_head(Counter(buckets.tolist()), batch_size, head)
    first, full, waiting = list[int](), list[int](), dict[int, list[int]]()
    for place, bucket in enumerate(buckets.tolist()):
        if ahead[bucket]:
            ahead[bucket] -= 1
            first.append(place)
            continue
        batch = waiting.setdefault(bucket, [])
        batch.append(place)
        if len(batch) == batch_size:
            full += waiting.pop(bucket)
    return torch.tensor(first + full + [place for batch in waiting.values() for place in batch])


def _choose_head(counts: Mapping[int, int], batch_size: int, head: int) -> dict[int, int]:
    """Return how many samples of each bucket come first: such as fill no batch, and only then others."""
    chosen = dict.fromkeys(counts, 0)
    for bucket, count in counts.items():
        chosen[bucket] = min(count % batch_size, head)
        head -= chosen[bucket]
    for bucket, count in counts.items():
        more = min(count - chosen[bucket], head)
        chosen[bucket] += more
        head -= more
    return chosen


def split_by_bucket(batch: Sequence[Item]) -> list[list[Item]]:
    """Return the samples of a batch in parts of one bucket each, which go through the model one after the other."""
    parts: dict[int, list[Item]] = {}
    for sample in batch:
        parts.setdefault(sample.bucket, []).append(sample)
    return list(parts.values())
