"""The budget: how many steps each proxy takes in each round, and what happens at a round's end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

RoundKind = Literal["average", "redistribute"]

MIN_AUTO_STEPS, MAX_AUTO_STEPS, AUTO_ROUNDS = 50, 1000, 6


@dataclass(frozen=True)
class RoundSchedule:
    """How ``total_steps`` optimizer steps, counted over all proxies, are spent in rounds.

    Proxy k takes ``total_steps // num_shards`` steps, the first ``total_steps % num_shards`` proxies one more. With
    redistribution, rounds 1, 3, 5, ... (indices 0, 2, 4, ...) move samples and the others average; without it every
    round averages. The last round always averages.
    """

    total_steps: int
    num_shards: int
    steps_per_round: int
    redistributes: bool = False

    @classmethod
    def plan(
        cls, total_steps: int, num_shards: int, steps_per_round: int | Literal["auto"], redistributes: bool
    ) -> "RoundSchedule":
        """Return the schedule; ``"auto"`` makes six rounds of 50 to 1000 steps per proxy."""
        if steps_per_round == "auto":
            per_shard = -(-total_steps // num_shards)
            steps = min(max(-(-per_shard // AUTO_ROUNDS), MIN_AUTO_STEPS), MAX_AUTO_STEPS)
        else:
            steps = steps_per_round
        return cls(total_steps, num_shards, steps, redistributes and num_shards > 1)

    def shard_steps(self, shard_index: int) -> int:
        """Return the number of optimizer steps of a proxy over the whole run."""
        return self.total_steps // self.num_shards + (shard_index < self.total_steps % self.num_shards)

    @property
    def num_rounds(self) -> int:
        """Number of rounds; the last may be shorter."""
        return -(-self.shard_steps(0) // self.steps_per_round)

    def steps_in_round(self, round_index: int, shard_index: int) -> int:
        """Return the number of steps of a proxy in one round (0 is possible in the last round)."""
        left = self.shard_steps(shard_index) - round_index * self.steps_per_round
        return min(max(left, 0), self.steps_per_round)

    def kind(self, round_index: int) -> RoundKind:
        """Return what ends a round."""
        last = round_index == self.num_rounds - 1
        return "redistribute" if self.redistributes and round_index % 2 == 0 and not last else "average"


def round_mean(row: Mapping[str, Any], name: str) -> float | None:
    """Return the mean of a number over the shards of a round, each weighing as many steps as it took; None of none."""
    known = [(shard["steps"], shard[name]) for shard in row["shards"] if shard[name] is not None]
    steps = sum(weight for weight, _ in known)
    return sum(weight * value for weight, value in known) / steps if steps else None
