"""What the guard decided on one batch: on the device at once, on the host when it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from sd_memguard.core.bands import Bands


class Counted(NamedTuple):
    """What the host knows of a judged batch: losses (B,), their ratios (B,), and bands, all on the CPU."""

    losses: Tensor
    loss_ratio: Tensor
    bands: Bands


@dataclass(frozen=True)
class Verdict:
    """What the guard decided on one batch.

    What is counted on the host (``divisor``, the numbers and ``losses``, and with them ``loss``) is there when it is
    first asked for: with ``weigh(..., wait=False)`` that is when the host waits for the device.

    Attributes:
        clean_sum: scalar, the sum of the weighted losses of the clean samples, for loops that accumulate several
            batches and divide by all their clean samples.
        loss_ratio: (B,) loss over the bank's value, inf where no decision is due.
        skip_mask: (B,) bool, True where skipped.
        augment_mask: (B,) bool, True where the sample waits to be trained from an augmented copy.
    """

    clean_sum: Tensor
    loss_ratio: Tensor
    skip_mask: Tensor
    augment_mask: Tensor
    _count: Callable[[], Counted] = field(repr=False)
    _divisor: Callable[[int, int], float] | None = field(default=None, repr=False)

    @cached_property
    def counted(self) -> Counted:
        """The batch on the host; asked for the first time, it enters the guard's ledger and queue."""
        return self._count()

    @cached_property
    def loss(self) -> Tensor:
        """Scalar to backward: the sum of the weighted losses of the clean samples over their number (0 with none).

        In an attached loop that accumulates, the gradient of a step comes out as the mean over all its batches.
        """
        return self.clean_sum / self.divisor

    @cached_property
    def divisor(self) -> float:
        """What the sum is divided by in ``loss``."""
        if self._divisor is None:
            return float(max(self.num_clean, 1))
        return self._divisor(len(self.losses), self.num_clean)

    @property
    def num_clean(self) -> int:
        """Number of clean samples; with 0 no optimizer step should be taken."""
        return int(self.counted.bands.clean_mask.sum())

    @property
    def num_skipped(self) -> int:
        """Number of skipped samples."""
        return int(self.counted.bands.skip_mask.sum())

    @property
    def num_augmented(self) -> int:
        """Number of samples to augment."""
        return int(self.counted.bands.augment_mask.sum())

    @property
    def losses(self) -> Tensor:
        """(B,) float32 on the CPU, the losses as they were judged."""
        return self.counted.losses
