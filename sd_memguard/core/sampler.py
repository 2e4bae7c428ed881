"""The order in which a shard's samples are seen, and the sampler that remembers where it stands."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sd_memguard.core.seeding import generator_for, permutation


class SampleRef(NamedTuple):
    """One sample in one epoch of its shard: the address of every random number for it."""

    sample_id: int
    shard_index: int
    epoch_index: int


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
        refs: list[SampleRef] = []
        epoch_index, start = self.epoch_index, self.position
        while len(refs) < count:
            shown = members if groups is None else self._choose_members(members, groups, epoch_index, seed)
            order = permutation(seed, "order", self.shard_index, epoch_index, length=len(shown))
            chosen = shown[order[start : start + count - len(refs)]]
            refs += [SampleRef(sample_id, self.shard_index, epoch_index) for sample_id in chosen.tolist()]
            epoch_index, start = epoch_index + 1, 0
        return refs

    def batches(
        self, members: Tensor, batch_size: int, seed: int, groups: Tensor | None = None
    ) -> Iterator[list[SampleRef]]:
        """Yield batches from here on, without end and without moving on; see ``peek``."""
        ahead = replace(self)
        epoch_length = len(members) if groups is None else len(torch.unique(groups))
        while True:
            yield ahead.peek(members, batch_size, seed, groups)
            ahead.advance(batch_size, epoch_length)

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
