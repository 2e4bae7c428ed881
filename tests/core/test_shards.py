import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sd_memguard.core.shards import (
    NO_SHARD,
    _emptiest_first,
    auto_num_shards,
    count_images,
    split_into_shards,
)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_shards_are_disjoint_complete_and_even(data):
    num_samples = data.draw(st.integers(1, 60))
    excluded = data.draw(st.sets(st.integers(0, num_samples - 1), max_size=num_samples - 1))
    num_shards = data.draw(st.integers(1, num_samples - len(excluded)))
    exclude = torch.tensor(sorted(excluded), dtype=torch.int64)
    plan = split_into_shards(num_samples, num_shards, data.draw(st.integers(0, 99)), exclude=exclude)
    members = [plan.members(k).tolist() for k in range(num_shards)]
    together = sorted(sample for shard in members for sample in shard)
    assert together == [i for i in range(num_samples) if i not in excluded]
    assert all(plan.assignment[sample] == NO_SHARD for sample in excluded)
    assert all(shard == sorted(shard) for shard in members)
    assert plan.sizes() == [len(shard) for shard in members]
    assert max(plan.sizes()) - min(plan.sizes()) <= 1


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=50),
    st.integers(1, 5),
    st.integers(0, 99),
    st.booleans(),
    st.booleans(),
)
def test_groups_stay_together(groups, num_shards, seed, excludes_the_first, balanced):
    exclude = torch.tensor([0]) if excludes_the_first else None
    placed = list(range(excludes_the_first, len(groups)))
    assume(len({groups[i] for i in placed}) >= num_shards)
    plan = split_into_shards(len(groups), num_shards, seed, torch.tensor(groups), exclude, balanced=balanced)
    shard_of = plan.assignment.tolist()
    assert all(shard_of[i] in range(num_shards) for i in placed)
    assert excludes_the_first is (shard_of[0] == NO_SHARD)
    for i in placed:
        assert {shard_of[j] for j in placed if groups[j] == groups[i]} == {shard_of[i]}
    sizes = [sum(groups[j] == groups[i] for j in placed) for i in placed]
    assert min(plan.sizes()) > 0
    largest_step = 1 if balanced else max(sizes)
    counted = plan.sizes(torch.tensor(groups)) if balanced else plan.sizes()
    assert max(counted) - min(counted) <= largest_step
    num_groups = [len({groups[i] for i in placed if shard_of[i] == k}) for k in range(num_shards)]
    assert plan.sizes(torch.tensor(groups)) == num_groups
    assert count_images(len(groups), torch.tensor(groups), exclude) == sum(num_groups)


def test_single_samples_level_out_the_groups():
    groups = torch.tensor([0] * 5 + [1] * 3 + list(range(2, 14)))  # 5 + 3 + 12 singles: 20 in 4 shards
    assert split_into_shards(20, 4, 0, groups).sizes() == [5, 5, 5, 5]


def test_groups_of_one_and_no_groups_are_equally_even():
    plain = split_into_shards(11, 3, 0)
    assert plain.sizes() == [4, 4, 3]
    for balanced in (False, True):
        grouped = split_into_shards(11, 3, 0, torch.arange(11), balanced=balanced)
        assert torch.equal(grouped.assignment, plain.assignment)


def test_the_seed_is_the_split():
    one, again, other = (split_into_shards(40, 4, seed).assignment for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    # Shuffled, not cut in blocks of the file order or dealt in turn.
    assert not torch.equal(one, torch.arange(40).to(one.dtype) // 10)
    assert not torch.equal(one, torch.arange(40).to(one.dtype) % 4)


@pytest.mark.parametrize("num_shards", [0, 11])
def test_number_of_shards_is_checked(num_shards):
    message = rf"`num_shards` must be between 1 and the number of samples \(10\), got {num_shards}; lower it"
    with pytest.raises(ValueError, match=message):
        split_into_shards(12, num_shards, 0, exclude=torch.tensor([3, 4]))


def test_groups_count_as_one_for_the_number_of_shards():
    with pytest.raises(ValueError, match=r"\(2 groups of duplicates\), got 3"):
        split_into_shards(6, 3, 0, torch.tensor([0, 0, 0, 1, 1, 1]))


@pytest.mark.parametrize(("num_samples", "expected"), [(1, 1), (127, 1), (128, 2), (255, 3), (256, 4), (9999, 4)])
def test_auto_leaves_each_shard_64_samples(num_samples, expected):
    assert auto_num_shards(num_samples, epochs=1000) == expected
    assert auto_num_shards(num_samples) == 1


@pytest.mark.parametrize(("epochs", "expected"), [(0.1, 1), (200, 1), (200.1, 2), (600, 3), (601, 4), (1000, 4)])
def test_auto_takes_more_shards_for_a_longer_training(epochs, expected):
    assert auto_num_shards(9999, epochs) == expected
    assert auto_num_shards(150, epochs) == min(expected, 2)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 30))
def test_singles_go_to_the_emptiest_shard_one_by_one(sizes, count):
    fill, expected = list(sizes), []
    for _ in range(count):
        shard = fill.index(min(fill))
        fill[shard] += 1
        expected.append(shard)
    assert _emptiest_first(sizes, count).tolist() == expected
