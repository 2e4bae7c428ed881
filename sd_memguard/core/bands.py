"""AGC and TAA: the three bands of the loss ratio (arXiv 2502.09434)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Bands(NamedTuple):
    """What becomes of each sample, (B,) bool each; exactly one is True for each sample."""

    skip_mask: Tensor
    augment_mask: Tensor
    clean_mask: Tensor


def classify(loss_ratio: Tensor, skip_threshold: float, augment_threshold: float) -> Bands:
    """Return the band of each sample.

    Below ``skip_threshold`` a sample is skipped; from there to below ``augment_threshold`` it is trained from an
    augmented copy; above it is clean. ``skip_threshold`` 0 makes everything clean (the strength of an augmentation is
    measured from that threshold); ``augment_threshold <= skip_threshold`` leaves two bands.

    >>> classify(torch.tensor([0.7, 0.8, 1.2]), 0.8, 1.2).augment_mask.tolist()
    [False, True, False]
    """
    skip_mask = loss_ratio < skip_threshold
    upper = augment_threshold if skip_threshold > 0 else 0.0
    augment_mask = (loss_ratio >= skip_threshold) & (loss_ratio < upper)
    return Bands(skip_mask, augment_mask, torch.logical_not(skip_mask | augment_mask))
