"""The order in which a shard's samples are visited, and the cursor that remembers where it stands."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sd_memguard.core.seeding import permutation


class Visit(NamedTuple):
    """One sample seen once; its address for every draw made for it."""

    sample_id: int
    shard_index: int
    pass_index: int


@dataclass
class VisitCursor:
    """Where a shard stands in its passes.

    The order of a pass is ``permutation(seed, shard, pass)`` of the shard's members, so this pair is all there is to
    save. A pass number is never used twice: a change of membership begins the next pass.
    """

    shard_index: int
    pass_index: int = 0
    position: int = 0

    def peek(self, members: Tensor, count: int, seed: int) -> list[Visit]:
        """Return the next ``count`` visits without moving on; a new pass begins where one ends.

        Args:
            members: (size,) int64, the sample ids of the shard.
            count: number of visits.
            seed: seed of the run.
        """
        visits: list[Visit] = []
        pass_index, start = self.pass_index, self.position
        while len(visits) < count:
            order = permutation(seed, "order", self.shard_index, pass_index, length=len(members))
            chosen = members[order[start : start + count - len(visits)]]
            visits += [Visit(sample_id, self.shard_index, pass_index) for sample_id in chosen.tolist()]
            pass_index, start = pass_index + 1, 0
        return visits

    def advance(self, count: int, num_members: int) -> None:
        """Move on by ``count`` visits."""
        passes, self.position = divmod(self.position + count, num_members)
        self.pass_index += passes

    def begin_pass(self) -> None:
        """Begin the next pass because the members of the shard have changed."""
        self.pass_index += 1
        self.position = 0
