"""Processes with shards of their own meet at round ends, for checkpoints, and to stop; between them nothing is sent.

Each comes to a meeting for a reason of its own, and the strongest reason wins: a process that waits at the end of its
round joins a checkpoint or a stop, and comes back. So nobody waits for a meeting that another one never comes to.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd_memguard.core.augmentation import AugmentQueue
from sd_memguard.core.progress import Progress, ShardMeter
from sd_memguard.core.sampler import ShardSampler
from sd_memguard.sample_guard import SampleGuard
from sd_memguard.training.ranks import Ranks

COUNTERS = ("empty_steps", "nonfinite_steps", "unreadable_samples", "image_forwards", "round_extra_steps")
"""What every process counts for itself between two rank_sync, and adds up there."""


class Reason(IntEnum):
    """Why a process comes to a meeting; of several, the highest wins."""

    ROUND_END = 0
    CHECKPOINT = 1
    STOP = 2


class Outcome(NamedTuple):
    """What the meeting decides: the reason that won, and the signal that asked to stop (0 for none)."""

    reason: Reason
    signal: int


class RankSync:
    """The rank_sync of a run, as one process sees them.

    Args:
        ranks: who trains what.
        guard: whose ledger, banks and queues are merged.
        progress: where the run stands, the same for all processes.
        checkpointing_steps: optimizer steps over all proxies between checkpoints.
    """

    def __init__(self, ranks: Ranks, guard: SampleGuard, progress: Progress, checkpointing_steps: int) -> None:
        self.ranks, self.guard, self.progress = ranks, guard, progress
        self.checkpointing_steps = checkpointing_steps
        self.checkpoints_made = progress.global_step // checkpointing_steps
        self._before = self._counters()

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether this process has taken its share of the steps up to the next checkpoint."""
        steps = sum(self.progress.shard_steps[shard_index] for shard_index in self.ranks.shards)
        return steps * self.ranks.exchange.size >= (self.checkpoints_made + 1) * self.checkpointing_steps

    def synchronize(self, reason: Reason, signal: int = 0) -> Outcome:
        """Wait for all, and merge what they know: afterwards guard and progress are the same in every process.

        Args:
            reason: why this process comes.
            signal: number of the signal that it has received.
        """
        rows = self.ranks.exchange.all_gather(torch.tensor([reason, signal]), "rank_sync")
        outcome = Outcome(Reason(int(rows[:, 0].max())), int(rows[:, 1].max()))
        self._merge_progress()
        self._merge_guard()
        if outcome.reason is not Reason.ROUND_END:
            self.checkpoints_made = max(
                self.progress.global_step // self.checkpointing_steps, self.checkpoints_made + 1
            )
        return outcome

    def _counters(self) -> dict[str, int]:
        return {name: getattr(self.progress, name) for name in COUNTERS}

    def _merge_progress(self) -> None:
        progress, before = self.progress, self._before
        own: list[dict[str, Any]] = [
            {
                "shard": shard_index,
                "steps": progress.shard_steps[shard_index],
                "extra": progress.extra_steps[shard_index],
                "sampler": vars(progress.samplers[shard_index]),
                "meter": vars(progress.meters[shard_index]),
            }
            for shard_index in self.ranks.shards
        ]
        counted = {name: number - before[name] for name, number in self._counters().items()}
        for shards, counters in self.ranks.exchange.all_gather_object([own, counted], "progress"):
            for row in shards:
                if row["shard"] in self.ranks.shards:
                    continue  # its own sampler and meter stay the objects that the loop holds
                progress.shard_steps[row["shard"]] = row["steps"]
                progress.extra_steps[row["shard"]] = row["extra"]
                progress.samplers[row["shard"]] = ShardSampler(**row["sampler"])
                progress.meters[row["shard"]] = ShardMeter(**row["meter"])
            for name, number in counters.items():
                before[name] += number
        for name, number in before.items():
            setattr(progress, name, number)
        progress.global_step = sum(progress.shard_steps)

    def begin_round(self) -> None:
        """Take note that a counter of the round begins again."""
        self._before = self._counters()

    def _merge_guard(self) -> None:
        exchange, guard = self.ranks.exchange, self.guard
        guard.count()
        # What a process knows of the shards of others is what it was told last, so it gives the rows of its own alone.
        own = torch.isin(guard.plan.assignment, torch.tensor(self.ranks.shards).to(guard.plan.assignment.dtype))
        for counts in guard.ledger.counted():
            counts.copy_(exchange.all_reduce(counts * own, "ledger"))
        mine = torch.zeros(guard.num_shards, dtype=torch.bool)
        mine[list(self.ranks.shards)] = True
        for name in guard.rules[0].tensors():
            rows = torch.stack([rule.tensors()[name] for rule in guard.rules])
            merged = exchange.all_reduce(_only(rows, mine), "rules")
            for rule, row in zip(guard.rules, merged, strict=True):
                rule.tensors()[name].copy_(row)
        queues = [(k, guard.queues[k].sample_ids, guard.queues[k].strengths) for k in self.ranks.shards]
        for shards in exchange.all_gather_object(queues, "queues"):
            for shard_index, sample_ids, strengths in shards:
                guard.queues[shard_index] = AugmentQueue(sample_ids, strengths)


def _only(rows: Tensor, mine: Tensor) -> Tensor:
    """Return the rows of this process, with zeros in place of the others."""
    return torch.where(mine.to(rows.device).view(-1, *(1 for _ in rows.shape[1:])), rows, torch.zeros_like(rows))
