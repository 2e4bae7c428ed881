"""The ledger: how often each sample was seen, met each action of the rule, and moved."""

import torch
from torch import Tensor

from sd_memguard.core.rules.base import Action


class SampleLedger:
    """Counts per sample, each a (num_samples,) int32 tensor on the CPU.

    Args:
        num_samples: number of samples.
        actions: of the sample rule.

    Attributes:
        seen: how often a sample was in a batch.
        actions: how often each action was taken, by the action's column, e.g. ``actions["skipped"]``.
        moves: how often a sample changed shard.
        skips: how often a sample was no clean update since the last redistribution: the ``skips[i]`` of MSR.
    """

    def __init__(self, num_samples: int, actions: tuple[Action, ...]) -> None:
        self.seen, self.moves, self.skips = (torch.zeros(num_samples, dtype=torch.int32) for _ in range(3))
        self.actions = {action.column: torch.zeros(num_samples, dtype=torch.int32) for action in actions}
        self._memory_prone = [action.column for action in actions if action.memory_prone]

    def record(self, sample_ids: Tensor, actions: Tensor) -> None:
        """Count one batch.

        Args:
            sample_ids: (B,) int64 on the CPU; an id may occur twice.
            actions: (B,) int64 on the CPU, 0 for a clean update, ``i`` for the rule's ``i``-th action.
        """
        self.seen.index_add_(0, sample_ids, torch.ones_like(sample_ids, dtype=torch.int32))
        for index, (column, counts) in enumerate(self.actions.items(), start=1):
            taken = (actions == index).int()
            counts.index_add_(0, sample_ids, taken)
            if column in self._memory_prone:
                self.skips.index_add_(0, sample_ids, taken)

    def record_moves(self, sample_ids: Tensor) -> None:
        """Count samples that changed shard and reset ``skips`` for all samples."""
        self.moves[sample_ids] += 1
        self.skips.zero_()

    def not_clean(self) -> Tensor:
        """Return how often each sample was no clean update for a sign of memorization, (num_samples,) int32."""
        return sum((self.actions[column] for column in self._memory_prone), torch.zeros_like(self.seen))

    def skip_ratio(self) -> Tensor:
        """Return the share of the times seen that were no clean update, (num_samples,) float32; 0 where never seen."""
        return self.not_clean() / self.seen.clamp(min=1)

    def columns(self) -> dict[str, Tensor]:
        """Return what the record of the samples shows, in its order."""
        return {"seen": self.seen, **self.actions, "moves": self.moves}

    def counted(self) -> list[Tensor]:
        """Return what a batch changes."""
        return [self.seen, *self.actions.values(), self.skips]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts by name."""
        return {**self.columns(), "skips": self.skips}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over saved counts.

        Raises:
            ValueError: they are of another number of samples or other actions; nothing is changed then.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"this ledger counts {', '.join(own)}, the saved one {', '.join(state)}")
        if state["seen"].shape != self.seen.shape:
            raise ValueError(f"this ledger has {len(self.seen)} samples, the saved one {len(state['seen'])}")
        for name, counts in own.items():
            counts.copy_(state[name])
