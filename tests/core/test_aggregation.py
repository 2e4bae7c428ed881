import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_memguard.core import aggregation
from sd_memguard.core.aggregation import aggregate, distance, iterate_aggregate
from tests.reference.slow_guard import slow_average


def random_states(count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (3, 4), "bias": (3,), "scale": ()}
    return [{n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()} for _ in range(count)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any), st.integers(0, 99))
def test_aggregate_equals_the_mean_number_by_number(weights, seed):
    states = random_states(len(weights), seed)
    flat = [{name: tensor.flatten().tolist() for name, tensor in state.items()} for state in states]
    expected = slow_average(flat, weights)
    for name, tensor in aggregate(states, weights).items():
        # Half a unit in the last place of the cast, and the rounding of the float64 sum.
        wanted = torch.tensor(expected[name], dtype=torch.float64).reshape(tensor.shape)
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), wanted, rtol=2**-24 * 1.001, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", [1.0, 0.1, 37])
def test_aggregate_of_one_state_is_that_state_to_the_bit(dtype, weight):
    (state,) = random_states(1, dtype=dtype)
    mean = aggregate([state], [weight])
    assert all(torch.equal(mean[name], state[name]) and mean[name].dtype == dtype for name in state)
    assert all(mean[name].data_ptr() != state[name].data_ptr() for name in state)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_aggregate_of_equal_states_is_that_state(count):
    (state,) = random_states(1)
    mean = aggregate([state] * count, [1.0] * count)
    assert all(torch.equal(mean[name], state[name]) for name in state)


def test_golden_weighted_mean():
    states = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([5.0, 4.0])}]
    assert aggregate(states, [3, 1])["w"].tolist() == [2, 1]
    assert aggregate(states, [0.75, 0.25])["w"].tolist() == [2, 1]
    assert aggregate(states, [0, 2])["w"].tolist() == [5, 4]


def test_names_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"the states differ in their names: \['b'\]"):
        aggregate([{"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)}], [1, 1])


@pytest.mark.parametrize("weights", [[1], [1, 1, 1], [0, 0], [2, -1], [math.nan, 1], [math.inf, 1], []])
def test_weights_that_cannot_be_normalized_are_refused(weights):
    with pytest.raises(ValueError, match="2 states need as many weights, none negative, some positive"):
        aggregate(random_states(2), weights)


def test_no_states_are_refused():
    with pytest.raises(ValueError, match="0 states need as many weights"):
        aggregate([], [])


def test_distance_is_euclidean():
    zero = {"a": torch.zeros(2), "b": torch.zeros(1, 1)}
    assert distance({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[2.0]])}, zero) == 3
    assert distance(zero, zero) == 0


@pytest.mark.parametrize(("together", "num_exchanges"), [(1, 3), (4, 2), (10**6, 1)])
def test_partial_sums_of_processes_give_the_aggregate_of_all(monkeypatch, together, num_exchanges):
    monkeypatch.setattr(aggregation, "TOGETHER", together)
    states, weights = random_states(4), [1.0, 2.0, 3.0, 0.5]
    names = sorted(states[0])
    told: list[torch.Tensor] = []
    other = iterate_aggregate(
        states[1::2], weights[1::2], names=names, total=6.5, combine=lambda s: told.append(s) or s
    )
    assert [name for name, _ in other] == names
    parts = iter(told)
    own = iterate_aggregate(states[::2], weights[::2], names=names, total=6.5, combine=lambda s: s + next(parts))
    expected = aggregate(states, weights)
    for name, mean in own:
        torch.testing.assert_close(mean, expected[name], rtol=1e-6, atol=1e-7)
        assert mean.dtype == expected[name].dtype
    assert len(told) == num_exchanges
    assert next(parts, None) is None
