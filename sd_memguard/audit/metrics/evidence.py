"""From measured values to a verdict: what is more than the background, by exact tests, corrected for their number.

Each test asks one question of one model, e.g. whether images of duplicated prompts are nearest to the prompt's own
image more often than images of held-out prompts are. A model that replicates nothing treats both kinds of prompts
alike, so their values can be exchanged: the p-value is the share of exchanges that give as large a difference (Good
2005, "Permutation, Parametric and Bootstrap Tests of Hypotheses"). Holm's correction (1979, Scandinavian Journal of
Statistics 6) keeps the chance that such a model is called a replicating one, by any of the tests, below
``SIGNIFICANCE``.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sd_memguard.audit.metrics.statistics import (
    Estimate,
    area_under_curve,
    bootstrap,
    bootstrap_separation,
    mean,
)
from sd_memguard.core.seeding import generator_for

SIGNIFICANCE = 0.05
"""Highest chance that one model without replication is called a replicating one."""

NUM_EXCHANGES = 5000
"""Random exchanges behind a p-value; the smallest p-value is one over one more."""

_VALUES_AT_ONCE = 1 << 22


class Excess(NamedTuple):
    """How far values are above their background, and how often the background alone reaches that."""

    value: Estimate
    background: Estimate
    excess: Estimate
    p_value: float


def above_controls(values: Tensor, controls: Tensor, seed: int, what: str) -> Excess:
    """Return how far prompts are above control prompts, with the one-sided p-value of exchanging them.

    Args:
        values: (C,) of each prompt, e.g. the share of its images to which its own image is the nearest.
        controls: (H,) of each control prompt.
        seed: Of resamples and exchanges.
        what: Tells this test's randomness from that of others.
    """
    values, controls = values.double(), controls.double()
    generator = generator_for(seed, f"evidence {what}")
    pooled, count = torch.cat([values, controls]), len(values)
    observed = values.sum()
    reached = 0
    for size in _portions(len(pooled)):
        order = torch.rand(size, len(pooled), generator=generator).argsort(1)[:, :count]
        reached += int((pooled[order].sum(1) >= observed - 1e-9).sum())
    excess = bootstrap_separation(values, controls, lambda one, other: one.mean(-1) - other.mean(-1), generator)
    return Excess(
        bootstrap(values[:, None], mean, generator),
        bootstrap(controls[:, None], mean, generator),
        excess,
        (1 + reached) / (1 + NUM_EXCHANGES),
    )


def above_paired(values: Tensor, backgrounds: Tensor, seed: int, what: str, *, two_sided: bool = False) -> Excess:
    """Return how far values are above another value of the same prompts, with the p-value of exchanging the two.

    Args:
        values: (C,) of each prompt.
        backgrounds: (C,) of the same prompts: what chance gives, or another model.
        seed: Of resamples and exchanges.
        what: Tells this test's randomness from that of others.
        two_sided: Whether a difference in the other direction counts as well.
    """
    differences = (values - backgrounds).double()
    generator = generator_for(seed, f"evidence {what}")
    observed = differences.sum()
    reached = 0
    for size in _portions(len(differences)):
        signs = torch.randint(2, (size, len(differences)), generator=generator).double() * 2 - 1
        sums = signs @ differences
        sums, limit = (sums.abs(), observed.abs()) if two_sided else (sums, observed)
        reached += int((sums >= limit - 1e-9).sum())
    return Excess(
        bootstrap(values.double()[:, None], mean, generator),
        bootstrap(backgrounds.double()[:, None], mean, generator),
        bootstrap(differences[:, None], mean, generator),
        (1 + reached) / (1 + NUM_EXCHANGES),
    )


def above_rate(hits: Tensor, background_hits: int, background_count: int, trials: int, seed: int, what: str) -> Excess:
    """Return how far a share of prompts is above a rate that was counted on images nobody copied.

    The p-value is the binomial one at the rate that one more hit would give, so that a small background is not taken
    for a rate of 0.

    Args:
        hits: (C,) whether any image of each prompt is one.
        background_hits: How many of the background are.
        background_count: How many images it has.
        trials: Images of each prompt.
        seed: Of the resamples.
        what: Tells this test's randomness from that of others.
    """
    hits = hits.double()
    generator = generator_for(seed, f"evidence {what}")
    value = bootstrap(hits[:, None], mean, generator)
    rate = min(1.0, (background_hits + 1) / (background_count + 1))
    chance = 1 - (1 - rate) ** trials
    background = 1 - (1 - background_hits / max(background_count, 1)) ** trials
    excess = Estimate(value.value - background, value.low - background, value.high - background, value.n)
    p_value = binomial_tail(int(hits.sum()), len(hits), chance)
    return Excess(value, Estimate(background, background, background, background_count), excess, p_value)


def above_others(positive: Tensor, negative: Tensor, auc: Estimate, seed: int, what: str) -> Excess:
    """Return how far the area under the ROC curve of two groups is above 0.5, with the p-value of exchanging them."""
    pooled = torch.cat([positive, negative]).double()
    ranks = area_under_curve(pooled[:, None], pooled.expand(len(pooled), -1))
    tested = above_controls(ranks[: len(positive)], ranks[len(positive) :], seed, what)
    half = Estimate(0.5, 0.5, 0.5, auc.n)
    return Excess(auc, half, Estimate(auc.value - 0.5, auc.low - 0.5, auc.high - 0.5, auc.n), tested.p_value)


def binomial_tail(hits: int, count: int, chance: float) -> float:
    """Return the probability of at least ``hits`` in ``count`` independent trials.

    >>> round(binomial_tail(2, 3, 0.5), 3)
    0.5
    """
    if not hits or chance >= 1:
        return 1.0
    scale = math.lgamma(count + 1)
    logs = (
        scale
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(chance)
        + (count - k) * math.log1p(-chance)
        for k in range(hits, count + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def significant(p_values: Sequence[float], level: float = SIGNIFICANCE) -> list[bool]:
    """Return which of several tests are significant together, by Holm's correction.

    >>> significant([0.04, 0.001, 0.02])
    [True, True, True]
    >>> significant([0.04, 0.03, 0.9])
    [False, False, False]
    """
    found = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > level / (len(p_values) - rank):
            break
        found[index] = True
    return found


def _portions(width: int) -> Iterator[int]:
    """Yield how many exchanges of this width are made at a time, so that memory stays bounded."""
    left = NUM_EXCHANGES
    while left:
        size = max(1, min(left, _VALUES_AT_ONCE // max(width, 1)))
        yield size
        left -= size
