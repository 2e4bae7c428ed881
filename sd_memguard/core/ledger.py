"""The ledger: how often each sample was seen, skipped, augmented and moved."""

import torch
from torch import Tensor

from sd_memguard.core.bands import Bands

COLUMNS = ("seen", "skipped", "augmented", "moves", "skips")


class SampleLedger:
    """Counts per sample, each a (num_samples,) int32 tensor on the CPU.

    ``skips`` counts the visits that were no clean update since the last redistribution: the ``skips[i]`` of MSR.

    Args:
        num_samples: number of samples.
    """

    def __init__(self, num_samples: int) -> None:
        self.seen, self.skipped, self.augmented, self.moves, self.skips = (
            torch.zeros(num_samples, dtype=torch.int32) for _ in COLUMNS
        )

    def record(self, sample_ids: Tensor, bands: Bands) -> None:
        """Count one batch.

        Args:
            sample_ids: (B,) int64 on the CPU; an id may occur twice.
            bands: the verdict on each sample, on the CPU.
        """
        skipped, augmented = bands.skip_mask.int(), bands.augment_mask.int()
        self.seen.index_add_(0, sample_ids, torch.ones_like(skipped))
        self.skipped.index_add_(0, sample_ids, skipped)
        self.augmented.index_add_(0, sample_ids, augmented)
        self.skips.index_add_(0, sample_ids, skipped + augmented)

    def record_moves(self, sample_ids: Tensor) -> None:
        """Count samples that changed shard and start counting skips again, for all samples."""
        self.moves[sample_ids] += 1
        self.skips.zero_()

    def skip_ratio(self) -> Tensor:
        """Return (skipped + augmented) / seen, (num_samples,) float32; 0 where never seen."""
        return (self.skipped + self.augmented) / self.seen.clamp(min=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts by name."""
        return {name: getattr(self, name) for name in COLUMNS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over saved counts.

        Raises:
            ValueError: they are of another number of samples; nothing is changed then.
        """
        if state["seen"].shape != self.seen.shape:
            raise ValueError(f"this ledger has {len(self.seen)} samples, the saved one {len(state['seen'])}")
        for name in COLUMNS:
            getattr(self, name).copy_(state[name])
