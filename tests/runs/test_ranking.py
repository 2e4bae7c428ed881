"""The order of memory-prone samples, and what chance makes of it."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sd_memguard.runs.ranking import expected_by_chance, memory_prone_order, memory_prone_score

COUNTS = st.lists(st.integers(0, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=12)


@given(COUNTS)
def test_order_against_a_sort_of_fractions(counts):
    seen, unclean = (np.array(column, dtype=np.int32) for column in zip(*counts, strict=True)) if counts else ([], [])
    scored = [(-Fraction(u, s + 1), position) for position, (s, u) in enumerate(counts) if u > 0]
    assert memory_prone_order(np.array(seen), np.array(unclean)).tolist() == [
        position for _, position in sorted(scored)
    ]


def test_nine_of_ten_outrank_one_of_one():
    assert memory_prone_order(np.array([1, 10, 5]), np.array([1, 9, 0])).tolist() == [1, 0]


def test_expectation_against_many_draws():
    random = np.random.default_rng(0)
    seen = np.array([3] * 40 + [7] * 60 + [0] * 5)
    unclean = random.binomial(seen, 0.4)
    rate = unclean.sum() / seen.sum()
    for score in (0.2, 0.5, 3 / 4, 6 / 8):
        drawn = [np.sum(memory_prone_score(seen, random.binomial(seen, rate)) >= score - 1e-12) for _ in range(4000)]
        error = np.std(drawn) / 4000**0.5
        assert abs(np.mean(drawn) - expected_by_chance(seen, unclean, score)) < 5 * error + 1e-9


def test_expectation_at_the_edges():
    seen = np.array([2, 2])
    assert expected_by_chance(seen, np.array([2, 2]), 2 / 3) == 2
    assert expected_by_chance(seen, np.array([0, 0]), 2 / 3) == 0
    assert expected_by_chance(np.array([2000]), np.array([1000]), 0.999) < 1e-9
