"""The order in which a shard's samples are visited, and the cursor that remembers where it stands."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sd_memguard.core.seeding import generator_for, permutation


class Visit(NamedTuple):
    """One sample seen once; its address for every draw made for it."""

    sample_id: int
    shard_index: int
    pass_index: int


@dataclass
class VisitCursor:
    """Where a shard stands in its passes.

    The order of a pass is ``permutation(seed, shard, pass)`` of the shard's members, or of its groups of duplicates
    where those count as one picture each, so this pair is all there is to save. A pass number is never used twice: a
    change of membership begins the next pass.
    """

    shard_index: int
    pass_index: int = 0
    position: int = 0

    def peek(self, members: Tensor, count: int, seed: int, groups: Tensor | None = None) -> list[Visit]:
        """Return the next ``count`` visits without moving on; a new pass begins where one ends.

        Args:
            members: (size,) int64, the sample ids of the shard.
            count: number of visits.
            seed: seed of the run.
            groups: (size,) int64, where a pass is to visit one member of each group: the next one from pass to pass,
                so that in as many passes as it has members each is visited once.
        """
        visits: list[Visit] = []
        pass_index, start = self.pass_index, self.position
        while len(visits) < count:
            drawn = members if groups is None else self._draw_members(members, groups, pass_index, seed)
            order = permutation(seed, "order", self.shard_index, pass_index, length=len(drawn))
            chosen = drawn[order[start : start + count - len(visits)]]
            visits += [Visit(sample_id, self.shard_index, pass_index) for sample_id in chosen.tolist()]
            pass_index, start = pass_index + 1, 0
        return visits

    def _draw_members(self, members: Tensor, groups: Tensor, pass_index: int, seed: int) -> Tensor:
        """Return one member of each group, (num_groups,) int64."""
        _, inverse, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
        by_group = members[torch.argsort(inverse, stable=True)]
        starts = torch.cumsum(sizes, 0) - sizes
        # The first one is drawn, the others follow in turn.
        generator = generator_for(seed, "duplicate", self.shard_index)
        first = (torch.rand(len(sizes), generator=generator, dtype=torch.float64) * sizes).long()
        return by_group[starts + (first + pass_index) % sizes]

    def advance(self, count: int, pass_length: int) -> None:
        """Move on by ``count`` visits in passes of this length: the number of members, or of groups."""
        passes, self.position = divmod(self.position + count, pass_length)
        self.pass_index += passes

    def begin_pass(self) -> None:
        """Begin the next pass because the members of the shard have changed."""
        self.pass_index += 1
        self.position = 0
