import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_memguard.core.augmentation import AugmentQueue, augment_magnitude, augment_strength
from tests.reference.slow_guard import SlowQueue, slow_magnitude, slow_strength


@given(st.floats(0.01, 3), st.floats(0.01, 3), st.sampled_from([0.5, 0.8, 1.0]))
def test_strength_of_a_ratio_equals_the_formula_of_loss_and_mean(loss, mean, skip_threshold):
    strength = augment_strength(torch.tensor([loss / mean], dtype=torch.float64), skip_threshold)
    assert strength.item() == pytest.approx(slow_strength(loss, mean, skip_threshold), rel=1e-9)


def test_golden_strengths():
    # exp(-5 (r / .8 - 1)): 1 at .8; exp(-1.25) at 1; exp(-2.5) at 1.2.
    found = augment_strength(torch.tensor([0.8, 1.0, 1.2]), 0.8).tolist()
    assert found == pytest.approx([1, 0.2865048, 0.0820850], rel=1e-5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_magnitude_equals_the_formula(strengths):
    # Either order of multiplying and dividing is the formula; they may differ by one where rounding meets a whole.
    assert abs(augment_magnitude(strengths) - slow_magnitude(strengths)) <= 1
    assert 0 <= augment_magnitude(strengths) <= 5


@pytest.mark.parametrize(("strengths", "expected"), [([1.0], 5), ([0.5, 0.7], 3), ([0.2, 0.1], 0), ([0.39], 1)])
def test_golden_magnitudes(strengths, expected):
    assert augment_magnitude(strengths) == expected


@settings(deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 99), st.floats(0, 1, width=32)), max_size=6), max_size=8),
    st.integers(1, 5),
    st.sampled_from(["keep", "drop"]),
)
def test_queue_equals_the_slow_queue(pushes, batch_size, surplus):
    queue, slow = AugmentQueue(), SlowQueue(surplus)
    for pushed in pushes:
        queue.push(torch.tensor([i for i, _ in pushed], dtype=torch.int64), torch.tensor([s for _, s in pushed]))
        for sample, strength in pushed:
            slow.push(sample, strength)
        while (expected := slow.take(batch_size)) is not None:
            taken = queue.pop(batch_size, keep_surplus=surplus == "keep")
            assert list(zip(*taken, strict=True)) == expected
        assert list(zip(queue.sample_ids, queue.strengths, strict=True)) == slow.waiting
        assert len(queue) == len(slow.waiting) < batch_size


def test_a_copy_of_the_queue_is_its_own():
    queue = AugmentQueue([1, 2], [0.5, 0.25])
    other = copy.deepcopy(queue)
    assert queue.pop(1, keep_surplus=True) == ([1], [0.5])
    assert other.sample_ids == [1, 2]
