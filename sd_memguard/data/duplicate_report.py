"""Which images of a dataset are near-identical, told by name."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sd_memguard.data.image_check import shortened
from sd_memguard.data.samples import Samples

NUM_NAMED_GROUPS = 5
NUM_NAMED_SAMPLES = 3


class DuplicateCount(NamedTuple):
    """How many groups of near-identical images there are, and how many samples they hold together."""

    num_groups: int
    num_samples: int

    def __str__(self) -> str:
        """Return both numbers as words."""
        groups = (
            "1 group of near-identical images holds"
            if self.num_groups == 1
            else (f"{self.num_groups:,} groups of near-identical images hold")
        )
        return f"{groups} {self.num_samples:,} samples"


def count_duplicates(groups: npt.NDArray[np.int64]) -> DuplicateCount:
    """Return how many groups of two and more there are, and their samples.

    Args:
        groups: (N,) int64, the group of each sample.
    """
    _, sizes = np.unique(groups, return_counts=True)
    return DuplicateCount(int((sizes > 1).sum()), int(sizes[sizes > 1].sum()))


def describe_duplicates(samples: Samples) -> str:
    """Return the number of groups, and the largest ones with files and captions, a line each.

    Args:
        samples: with groups.
    """
    assert samples.groups is not None
    count = count_duplicates(samples.groups[samples.sample_ids])
    if count.num_groups == 0:
        return "no near-identical images were found"
    firsts, sizes = np.unique(samples.groups[samples.sample_ids], return_counts=True)
    largest = np.argsort(-sizes, kind="stable")[:NUM_NAMED_GROUPS]
    lines = [f"{count} of {len(samples.sample_ids):,}; the largest:"]
    lines += [_describe_group(samples, int(firsts[row]), int(sizes[row])) for row in largest if sizes[row] > 1]
    return "\n".join(lines)


def _describe_group(samples: Samples, first: int, size: int) -> str:
    assert samples.groups is not None
    named = np.flatnonzero(samples.groups == first)[:NUM_NAMED_SAMPLES].tolist()
    texts = [f"{samples.file(sample_id)} {shortened(samples.captions(sample_id)[0])}" for sample_id in named]
    return f"  {size} times: {', '.join(texts)}{', ...' if size > len(named) else ''}"
