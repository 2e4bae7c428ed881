"""What the audit measures, as pure functions of similarities, signals, losses and features; torch only.

Every figure that is an average over captions or images comes as an ``Estimate`` with a bootstrap interval.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_RESAMPLES = 1000
"""Bootstrap resamples behind each interval."""

CONFIDENCE = 0.95
"""Share of the resamples that an interval holds."""

KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
"""How many subsets of at most what size the kernel distance is averaged over (Binkowski et al. 2018, section 4)."""

_VALUES_AT_ONCE = 1 << 22

Statistic = Callable[[Tensor], Tensor]
"""Takes (R, N) values to one number for each of R rows."""

Separation = Callable[[Tensor, Tensor], Tensor]
"""Takes (R, P) positives and (R, N) negatives to one number for each of R rows."""


@dataclass(frozen=True)
class Estimate:
    """A figure, its interval, and how many independent things (captions, images) it rests on."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Summary:
    """What many similarities have in common; ``share_above`` is the share that would be copies."""

    count: int
    mean: float
    p95: float
    max: float
    share_above: float


def summarize(similarity: Tensor, threshold: float) -> Summary:
    """Return count, mean, 95th percentile (linear interpolation), maximum and share at or above the threshold.

    The figures that Somepalli et al. 2023 (arXiv 2212.03860, section 4) report of similarities to the nearest image.

    Args:
        similarity: (N,) float, N at least 1.
        threshold: In the same unit.
    """
    above = (similarity >= threshold).float().mean().item()
    return Summary(
        len(similarity), similarity.mean().item(), percentile(similarity, 95).item(), similarity.max().item(), above
    )


def mean(values: Tensor) -> Tensor:
    """Return the mean of each row, (..., N) to (...), a ``Statistic``."""
    return values.mean(-1)


def percentile(values: Tensor, percent: float) -> Tensor:
    """Return a percentile of each row, (..., N) to (...), linear between the two nearest values."""
    ordered = values.sort(-1).values
    position = (values.shape[-1] - 1) * percent / 100
    low = int(position)
    high = min(low + 1, values.shape[-1] - 1)
    return torch.lerp(ordered[..., low], ordered[..., high], position - low)


def bootstrap(values: Tensor, statistic: Statistic, generator: torch.Generator) -> Estimate:
    """Return a statistic of all values with its percentile bootstrap interval over captions.

    Images of one prompt resemble each other, so prompts are resampled, each with all its images (cluster bootstrap;
    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 8 and 13). It says how far the figure would
    move with other captions of the same set, not with another training run.

    Args:
        values: (C, n): n values of each of C captions; (C, 1) for one value of each image.
        statistic: E.g. ``mean``.
        generator: Decides the resamples.
    """
    count, per_caption = values.shape
    values = values.double()
    found = []
    for size in _portions(count * per_caption):
        rows = torch.randint(count, (size, count), generator=generator)
        found.append(statistic(values[rows].flatten(1)))
    low, high = _interval(torch.cat(found))
    return Estimate(statistic(values.flatten()[None])[0].item(), low, high, count)


def bootstrap_separation(
    positive: Tensor, negative: Tensor, separation: Separation, generator: torch.Generator
) -> Estimate:
    """Return how two groups differ, with the interval from resampling both groups; ``n`` counts both.

    Args:
        positive: (P,) values of the one group.
        negative: (N,) values of the other.
        separation: E.g. ``area_under_curve``.
        generator: Decides the resamples.
    """
    groups = [positive.double(), negative.double()]
    found = []
    for size in _portions(len(positive) + len(negative)):
        resampled = [group[torch.randint(len(group), (size, len(group)), generator=generator)] for group in groups]
        found.append(separation(*resampled))
    low, high = _interval(torch.cat(found))
    value = separation(*(group[None] for group in groups))[0].item()
    return Estimate(value, low, high, len(positive) + len(negative))


def _portions(width: int) -> list[int]:
    """Return how many resamples of this width are made at a time, in turn, so that memory stays bounded."""
    size = max(1, min(NUM_RESAMPLES, _VALUES_AT_ONCE // width))
    whole, rest = divmod(NUM_RESAMPLES, size)
    return [size] * whole + [rest] * (rest > 0)


def _interval(found: Tensor) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    return percentile(found, tail).item(), percentile(found, 100 - tail).item()


def area_under_curve(positive: Tensor, negative: Tensor) -> Tensor:
    """Return the area under the ROC curve: how often a positive is above a negative, ties counted half.

    The Mann-Whitney form (Hanley and McNeil 1982): 1 = always above, 0.5 = no difference.

    Args:
        positive: (..., P).
        negative: (..., N).

    Returns:
        (...,) float64.
    """
    ordered = negative.sort(-1).values.contiguous()
    below = torch.searchsorted(ordered, positive.contiguous(), right=False)
    not_above = torch.searchsorted(ordered, positive.contiguous(), right=True)
    return (below + not_above).double().mean(-1) / (2 * negative.shape[-1])


def true_positive_rate(positive: Tensor, negative: Tensor, false_positive_rate: float = 0.01) -> Tensor:
    """Return the share of positives above a threshold that at most this share of the negatives is above.

    TPR at 1% FPR, the figure of Carlini et al. 2022, "Membership Inference Attacks From First Principles" (arXiv
    2112.03570). Below 100 negatives none may be above.

    Args:
        positive: (..., P).
        negative: (..., N).
        false_positive_rate: Between 0 and 1.

    Returns:
        (...,) float64.
    """
    # The tolerance makes 1% of 300 three: 0.01 * 300 is below 3 in floating point on some inputs.
    allowed = int(false_positive_rate * negative.shape[-1] + 1e-9)
    threshold = negative.sort(-1, descending=True).values[..., min(allowed, negative.shape[-1] - 1)]
    return (positive > threshold[..., None]).double().mean(-1)


def kernel_distance(
    generated: Tensor,
    real: Tensor,
    generator: torch.Generator,
    subset_size: int = KERNEL_SUBSET_SIZE,
    num_subsets: int = KERNEL_SUBSETS,
) -> Estimate:
    """Return KID: the unbiased squared MMD of features under the kernel ``(x.y / D + 1)^3``, averaged over subsets.

    Binkowski et al. 2018, "Demystifying MMD GANs" (arXiv 1801.01401), section 4. Unlike FID it is unbiased, so it
    can be read at a few hundred images, and be slightly negative where the two sets do not differ. The extractor's
    features take the place of Inception's: values compare only within one extractor.

    Args:
        generated: (N, D) features of generated images.
        real: (M, D) features of images.
        generator: Decides the subsets.
        subset_size: Images of each side in a subset; at most half of the smaller side, so that subsets differ.
        num_subsets: How many.

    Returns:
        The mean, the 2.5th and 97.5th percentile over the subsets, and the subset size as ``n``.
    """
    size = max(2, min(subset_size, len(generated) // 2, len(real) // 2))
    found = []
    for _ in range(num_subsets):
        rows, columns = (torch.randperm(len(side), generator=generator)[:size] for side in (generated, real))
        found.append(_squared_mmd(generated[rows].double(), real[columns].double()))
    values = torch.stack(found)
    return Estimate(values.mean().item(), *_interval(values), size)


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate for two sets of equally many rows."""
    size, width = x.shape
    within = sum(kernel.sum() - kernel.diagonal().sum() for kernel in (_cubic(x, x, width), _cubic(y, y, width)))
    return within / (size * (size - 1)) - 2 * _cubic(x, y, width).mean()


def _cubic(x: Tensor, y: Tensor, width: int) -> Tensor:
    return (x @ y.T / width + 1) ** 3


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """Return FID: the squared 2-Wasserstein distance of Gaussians fitted to two sets of features.

    Heusel et al. 2017 (arXiv 1706.08500): ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``, covariances with n - 1. It
    falls with the number of images, and with fewer images than features the covariances are singular: compare only
    values of equally many images. The extractor's features take the place of Inception's.

    Args:
        generated: (N, D) features of generated images.
        real: (M, D) features of images.
    """
    generated, real = generated.double(), real.double()
    first, second = torch.cov(generated.T).reshape(generated.shape[1], -1), torch.cov(real.T).reshape(real.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # C1 C2 has the eigenvalues of the symmetric root(C1) C2 root(C1), whose square root is real and stable.
    overlap = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    distance = (generated.mean(0) - real.mean(0)).square().sum() + first.trace() + second.trace() - 2 * overlap
    return distance.item()
