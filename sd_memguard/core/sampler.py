"""The order in which a shard's samples are visited, and the sampler that remembers where it stands."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sd_memguard.core.seeding import generator_for, permutation


class SampleRef(NamedTuple):
    """One sample seen once; its address for every draw made for it."""

    sample_id: int
    shard_index: int
    epoch_index: int


@dataclass
class ShardSampler:
    """Where a shard stands in its passes.

    The order of a pass is ``permutation(seed, shard, pass)`` of the shard's members, or of its groups of duplicates
    where those count as one image each, so this pair is all there is to save. A pass number is never used twice: a
    change of membership begins the next pass.
    """

    shard_index: int
    epoch_index: int = 0
    position: int = 0

    def peek(self, members: Tensor, count: int, seed: int, groups: Tensor | None = None) -> list[SampleRef]:
        """Return the next ``count`` visits without moving on; a new pass begins where one ends.

        Args:
            members: (size,) int64, the sample ids of the shard.
            count: number of visits.
            seed: seed of the run.
            groups: (size,) int64, where a pass is to visit one member of each group: the next one from pass to pass,
                so that in as many passes as it has members each is visited once.
        """
        visits: list[SampleRef] = []
        epoch_index, start = self.epoch_index, self.position
        while len(visits) < count:
            drawn = members if groups is None else self._draw_members(members, groups, epoch_index, seed)
            order = permutation(seed, "order", self.shard_index, epoch_index, length=len(drawn))
            chosen = drawn[order[start : start + count - len(visits)]]
            visits += [SampleRef(sample_id, self.shard_index, epoch_index) for sample_id in chosen.tolist()]
            epoch_index, start = epoch_index + 1, 0
        return visits

    def _draw_members(self, members: Tensor, groups: Tensor, epoch_index: int, seed: int) -> Tensor:
        """Return one member of each group, (num_groups,) int64."""
        _, inverse, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
        by_group = members[torch.argsort(inverse, stable=True)]
        starts = torch.cumsum(sizes, 0) - sizes
        # The first one is drawn, the others follow in turn.
        generator = generator_for(seed, "duplicate", self.shard_index)
        first = (torch.rand(len(sizes), generator=generator, dtype=torch.float64) * sizes).long()
        return by_group[starts + (first + epoch_index) % sizes]

    def advance(self, count: int, epoch_length: int) -> None:
        """Move on by ``count`` visits in passes of this length: the number of members, or of groups."""
        passes, self.position = divmod(self.position + count, epoch_length)
        self.epoch_index += passes

    def begin_epoch_of_shard(self) -> None:
        """Begin the next pass because the members of the shard have changed."""
        self.epoch_index += 1
        self.position = 0
