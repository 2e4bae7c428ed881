"""TAA: how strongly a sample near the skip threshold is augmented, and where it waits (arXiv 2502.09434)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

AUGMENT_BASE = 5.0
"""Both the rate of the exponential and the largest magnitude (the authors' ``augment_base``)."""
NUM_OPERATIONS = 2
"""Operations of RandAugment, as in the paper."""


def augment_strength(loss_ratio: Tensor, skip_threshold: float) -> Tensor:
    """Return ``exp(-5 d)`` with ``d = |loss / threshold - mean| / mean``, (B,): 1 at the skip threshold.

    >>> augment_strength(torch.tensor([0.8, 1.2]), 0.8)
    tensor([1.0000, 0.0821])
    """
    return torch.exp(-AUGMENT_BASE * (loss_ratio / skip_threshold - 1).abs())


def augment_magnitude(strengths: list[float]) -> int:
    """Return the magnitude of RandAugment for a batch: ``int(5 * mean strength)``, 0 to 5 of 30."""
    return int(AUGMENT_BASE * sum(strengths) / len(strengths))


@dataclass
class AugmentQueue:
    """Samples of one proxy that wait to be trained from an augmented copy."""

    sample_ids: list[int] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of samples that wait."""
        return len(self.sample_ids)

    def push(self, sample_ids: Tensor, strengths: Tensor) -> None:
        """Add samples with their strengths, (n,) each."""
        self.sample_ids += sample_ids.tolist()
        self.strengths += strengths.tolist()

    def pop(self, count: int, keep_surplus: bool) -> tuple[list[int], list[float]]:
        """Take the first ``count`` samples out; the rest stays, or is dropped as in the authors' code."""
        taken = self.sample_ids[:count], self.strengths[:count]
        rest = count if keep_surplus else len(self)
        self.sample_ids, self.strengths = self.sample_ids[rest:], self.strengths[rest:]
        return taken
