import numpy as np
import pytest
import torch

from sd_memguard.audit.metrics.statistics import (
    area_under_curve,
    bootstrap,
    bootstrap_separation,
    frechet_distance,
    kernel_distance,
    mean,
    percentile,
    summarize,
    true_positive_rate,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def test_summary_by_hand():
    summary = summarize(torch.tensor([0.1, 0.2, 0.3, 0.9]), 0.3)
    assert (summary.count, summary.share_above) == (4, 0.5)
    assert summary.mean == pytest.approx(0.375)
    assert summary.p95 == pytest.approx(0.3 + 0.85 * 0.6)
    assert summary.max == pytest.approx(0.9)


@pytest.mark.parametrize("percent", [0, 2.5, 50, 95, 100])
def test_percentile_is_numpys(percent):
    values = normal(7, 23)
    assert percentile(values, percent).tolist() == pytest.approx(
        np.percentile(values.numpy(), percent, axis=1).tolist()
    )


def test_area_under_curve_counts_pairs():
    # Rounded, so that there are ties.
    positive, negative = (normal(31, seed=1) + 0.5).round(decimals=1), normal(17, seed=2).round(decimals=1)
    pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
    assert any(pair == 0.5 for pair in pairs)
    assert area_under_curve(positive, negative).item() == pytest.approx(sum(pairs) / len(pairs))


def test_area_under_curve_of_whole_and_no_separation():
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0, 4.0])
    assert area_under_curve(high, low).item() == 1
    assert area_under_curve(low, high).item() == 0
    assert area_under_curve(low, low).item() == 0.5


@pytest.mark.parametrize("num_negatives", [20, 99, 100, 300, 1000])
def test_true_positive_rate_is_the_best_of_all_thresholds(num_negatives):
    positive, negative = normal(200, seed=3) + 1.5, normal(num_negatives, seed=4)
    thresholds = [*negative.tolist(), *positive.tolist(), -9.0]
    allowed = [t for t in thresholds if (negative > t).sum().item() * 100 <= num_negatives]
    best = max((positive > t).double().mean().item() for t in allowed)
    assert true_positive_rate(positive, negative).item() == pytest.approx(best)
    assert 0 < best < 1


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        sample = (3 + 2 * normal(50, seed=seed))[:, None]
        estimate = bootstrap(sample, mean, generator(seed))
        covered += estimate.low <= 3 <= estimate.high
    # Binomial: 95% of 200 is 190 with a deviation of 3; the percentile interval is a little short at 50.
    assert 177 <= covered <= 198


def test_bootstrap_draws_captions_not_generated():
    captions = normal(40, 1)
    once, often = (bootstrap(captions.expand(-1, n), mean, generator()) for n in (1, 25))
    assert (once.value, once.low, once.high) == pytest.approx((often.value, often.low, often.high))
    apart = bootstrap(captions.expand(-1, 25).reshape(-1, 1), mean, generator())
    assert apart.high - apart.low < 0.3 * (often.high - often.low)
    assert (often.n, apart.n) == (40, 1000)


def test_bootstrap_of_many_values_in_portions_covers_all_resamples():
    values = normal(5000, 4)
    estimate = bootstrap(values, mean, generator())
    half_width = 1.96 / 20000**0.5
    assert estimate.value == pytest.approx(values.mean().item())
    assert estimate.high - estimate.low == pytest.approx(2 * half_width, rel=0.15)


def test_separation_interval_holds_the_closed_form():
    # Two normal groups one deviation apart: AUC = Phi(1 / sqrt 2) = 0.7602.
    estimate = bootstrap_separation(normal(400, seed=5) + 1, normal(300, seed=6), area_under_curve, generator())
    assert estimate.low < 0.7602 < estimate.high
    assert estimate.low < estimate.value < estimate.high < estimate.low + 0.12
    assert estimate.n == 700


def slow_squared_mmd(x, y):
    width = len(x[0])

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / width + 1) ** 3

    count = len(x)
    first = sum(kernel(x[i], x[j]) for i in range(count) for j in range(count) if i != j) / (count * (count - 1))
    second = sum(kernel(y[i], y[j]) for i in range(count) for j in range(count) if i != j) / (count * (count - 1))
    return first + second - 2 * sum(kernel(a, b) for a in x for b in y) / count**2


def test_kernel_distance_is_the_mean_of_slow_ones_over_the_same_subsets():
    x, y = normal(14, 5, seed=7) + 0.4, normal(12, 5, seed=8)
    found = kernel_distance(x, y, generator(), subset_size=5, num_subsets=4)
    draws = generator()
    slow = []
    for _ in range(4):
        rows, columns = (torch.randperm(len(side), generator=draws)[:5] for side in (x, y))
        slow.append(slow_squared_mmd(x[rows].tolist(), y[columns].tolist()))
    assert found.value == pytest.approx(sum(slow) / 4)
    assert min(slow) <= found.low < found.high <= max(slow)
    assert found.n == 5


def test_kernel_distance_is_near_zero_for_one_distribution_and_not_for_two():
    same = kernel_distance(normal(600, 8, seed=1), normal(600, 8, seed=2), generator())
    other = kernel_distance(normal(600, 8, seed=1), normal(600, 8, seed=2) + 0.5, generator())
    assert abs(same.value) < 0.02 < other.low
    assert same.n == 300


def standardized(count, width, seed):
    """Rows with mean 0 and covariance 1, exactly."""
    rows = normal(count, width, seed=seed)
    rows = rows - rows.mean(0)
    return rows @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(rows.T))).T


def test_frechet_distance_of_known_gaussians():
    one, other = standardized(50, 3, 1), standardized(60, 3, 2) * torch.tensor([1.0, 2.0, 3.0]) + 2
    # |m1 - m2|^2 = 12, and the sum of (1 - s)^2 over deviations s = 1, 2, 3 is 5.
    assert frechet_distance(one, other) == pytest.approx(17)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_numpys():
    one, other = normal(40, 6, seed=1) @ normal(6, 6, seed=3), normal(30, 6, seed=2) + 0.3
    first, second = np.cov(one.numpy().T), np.cov(other.numpy().T)
    root = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).sum().real
    shift = np.square((one.mean(0) - other.mean(0)).numpy()).sum()
    assert frechet_distance(one, other) == pytest.approx(shift + np.trace(first) + np.trace(second) - 2 * root)
