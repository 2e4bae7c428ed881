"""Which samples are memory-prone, and how much of such a list chance alone would make."""

import math

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.integer]


def memory_prone_order(seen: Counts, unclean: Counts) -> npt.NDArray[np.int64]:
    """Return the positions of the samples, most memory-prone first, none that was never skipped or augmented.

    Ranked by unclean / (seen + 1), so that one out of one does not outrank nine out of ten; ties keep
    their order.

    Args:
        seen: (N,) how often each sample was seen.
        unclean: (N,) how often it was skipped or augmented.
    """
    score = memory_prone_score(seen, unclean)
    order = np.argsort(-score, kind="stable")
    return order[score[order] > 0]


def memory_prone_score(seen: Counts, unclean: Counts) -> npt.NDArray[np.float64]:
    """Return unclean / (seen + 1), (N,)."""
    return np.asarray(unclean) / (np.asarray(seen) + 1.0)


def expected_by_chance(seen: Counts, unclean: Counts, score: float) -> float:
    """Return how many samples would reach a score if each sample were unclean at the same rate each time.

    The rate is the mean over all samples seen, which are taken as independent: a sample seen n times is unclean
    Binomial(n, rate) times. A list whose last score as many samples reach by chance as in fact is noise.

    Args:
        seen: (N,) how often each sample was seen.
        unclean: (N,) how often it was skipped or augmented.
        score: of the sample in question, see ``memory_prone_score``.
    """
    rate = float(np.sum(unclean)) / max(int(np.sum(seen)), 1)
    expected = 0.0
    for times, num_samples in zip(*np.unique(seen, return_counts=True), strict=True):
        # A hair below, so that the score of a sample itself is reached in spite of rounding.
        least = math.ceil(score * (int(times) + 1) - 1e-9)
        expected += int(num_samples) * _binomial_tail(int(times), rate, least)
    return expected


def _binomial_tail(trials: int, rate: float, least: int) -> float:
    """Return the chance of at least so many successes."""
    if least <= 0:
        return 1.0
    if least > trials or rate <= 0:
        return 0.0
    if rate >= 1:
        return 1.0
    logs = (
        math.lgamma(trials + 1)
        - math.lgamma(count + 1)
        - math.lgamma(trials - count + 1)
        + count * math.log(rate)
        + (trials - count) * math.log1p(-rate)
        for count in range(least, trials + 1)
    )
    return min(math.fsum(map(math.exp, logs)), 1.0)
