import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_memguard.core.redistribution import _that_fit, redistribute
from sd_memguard.core.shards import NO_SHARD, ShardPlan, split_into_shards
from tests.reference.slow_guard import slow_redistribute


def plan_of(*shards, num_samples=None):
    num_samples = sum(map(len, shards)) if num_samples is None else num_samples
    assignment = torch.full((num_samples,), NO_SHARD, dtype=torch.int16)
    for shard_index, members in enumerate(shards):
        assignment[list(members)] = shard_index
    return ShardPlan(assignment, len(shards))


def shards_of(plan):
    return [plan.members(k).tolist() for k in range(plan.num_shards)]


@st.composite
def situations(draw):
    """A split with or without groups, and the skips before each of several redistributions."""
    num_samples = draw(st.integers(8, 40))
    counts = st.lists(st.integers(0, 4), min_size=num_samples, max_size=num_samples)
    labels = st.lists(st.integers(4, 16), min_size=num_samples - 4, max_size=num_samples - 4)
    groups = draw(st.none() | labels.map(lambda rest: [0, 1, 2, 3, *rest]))
    plan = split_into_shards(
        num_samples, draw(st.integers(1, 4)), draw(st.integers(0, 9)), None if groups is None else torch.tensor(groups)
    )
    return plan, groups, draw(st.sampled_from([0.0, 0.25, 0.5, 0.9])), draw(st.lists(counts, min_size=1, max_size=4))


@settings(deadline=None, max_examples=100)
@given(situations(), st.booleans())
def test_any_sequence_of_moves_equals_the_slow_rule_and_keeps_the_invariants(situation, balanced):
    plan, groups, fraction, history = situation
    group_tensor = None if groups is None else torch.tensor(groups)
    for skips in history:
        before = plan
        plan, moves = redistribute(before, torch.tensor(skips), fraction, group_tensor, balanced=balanced)
        shards, slow_moves = slow_redistribute(shards_of(before), skips, fraction, groups, balanced)
        assert shards_of(plan) == shards
        assert sorted(zip(*(column.tolist() for column in moves), strict=True)) == sorted(slow_moves)

        # Every sample in exactly one shard, and what leaves one arrives in the next.
        assert sorted(i for shard in shards_of(plan) for i in shard) == list(range(len(skips)))
        counted = group_tensor if balanced else None
        for k in range(plan.num_shards):
            movers = moves.sample_ids[moves.sources == k]
            num_moved = len(movers) if counted is None else len(torch.unique(counted[movers]))
            assert num_moved <= int(fraction * before.sizes(counted)[k])
            left, came = int((moves.sources == k).sum()), int((moves.targets == k).sum())
            assert plan.sizes()[k] == before.sizes()[k] - left + came
        assert (moves.targets == (moves.sources + 1) % plan.num_shards).all()

        # What moves was skipped, itself or a duplicate of it, and duplicates stay together.
        labels = list(range(len(skips))) if groups is None else groups
        skipped = {label for label, count in zip(labels, skips, strict=True) if count > 0}
        assert {labels[i] for i in moves.sample_ids.tolist()} <= skipped
        assert len(set(zip(labels, plan.assignment.tolist(), strict=True))) == len(set(labels))


def test_golden_moves():
    # Shards of 8: a quarter is two each. Ties (samples 1, 3 and 5) go to the lowest id; sample 8 was never skipped.
    plan = plan_of(range(8), range(8, 16))
    skips = torch.tensor([0, 2, 0, 2, 1, 2, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0])
    after, moves = redistribute(plan, skips, 0.25)
    assert moves.sample_ids.tolist() == [1, 3, 10]
    assert (moves.sources.tolist(), moves.targets.tolist()) == ([0, 0, 1], [1, 1, 0])
    assert after.members(0).tolist() == [0, 2, 4, 5, 6, 7, 10]
    assert plan.members(0).tolist() == list(range(8))  # the plan that was given is left as it is


def test_all_shards_hand_over_at_once():
    # Sample 0 arrives in shard 1 with the most skips of all, and yet does not move on to shard 2.
    after, moves = redistribute(plan_of([0, 1], [2, 3], [4, 5]), torch.tensor([9, 0, 1, 0, 1, 0]), 0.5)
    assert moves.sample_ids.tolist() == [0, 2, 4]
    assert shards_of(after) == [[1, 4], [0, 3], [2, 5]]


def test_a_group_counts_the_mean_of_its_members_and_moves_whole():
    # Means: group of 0, 1, 2 -> 2; sample 3 -> 3; group of 4, 5 -> 2.5. Quota 4 of 8: 3, then {4, 5}, and {0, 1, 2} no
    # longer fits, but sample 6 does.
    plan = plan_of(range(8), [8, 9])
    groups = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 5, 6])
    _, moves = redistribute(plan, torch.tensor([6, 0, 0, 3, 5, 0, 1, 0, 0, 0]), 0.5, groups)
    assert sorted(moves.sample_ids.tolist()) == [3, 4, 5, 6]


def test_a_balanced_group_counts_the_skips_of_all_its_members_as_one_image():
    # Seven images, of which one may move: the group of 0, 1 and 2 was skipped 4 times in all, sample 3 thrice.
    plan = plan_of(range(9), [9, 10])
    groups = torch.tensor([0, 0, 0, 3, 4, 5, 6, 7, 8, 9, 10])
    skips = torch.tensor([2, 0, 2, 3, 0, 0, 0, 0, 0, 0, 0])
    _, moves = redistribute(plan, skips, 0.25, groups, balanced=True)
    assert moves.sample_ids.tolist() == [0, 1, 2]
    _, moves = redistribute(plan, skips, 0.25, groups)  # two samples may move: the group does not fit
    assert moves.sample_ids.tolist() == [3]


def test_a_group_larger_than_the_share_stays_and_makes_room_for_others():
    plan = plan_of(range(8), [8, 9])
    groups = torch.tensor([0, 0, 0, 0, 0, 5, 6, 7, 8, 9])
    _, moves = redistribute(plan, torch.tensor([9] * 5 + [1, 1, 1, 0, 0]), 0.25, groups)
    assert moves.sample_ids.tolist() == [5, 6]


def test_excluded_samples_never_move():
    plan = plan_of([0, 2], [3, 4], num_samples=5)
    after, moves = redistribute(plan, torch.full((5,), 9), 0.5)
    assert after.assignment[1] == NO_SHARD
    assert moves.sample_ids.tolist() == [0, 3]


@pytest.mark.parametrize(("num_shards", "fraction", "count"), [(1, 0.25, 9), (2, 0.0, 9), (2, 0.25, 0)])
def test_nothing_to_do(num_shards, fraction, count):
    plan = split_into_shards(16, num_shards, 0)
    after, moves = redistribute(plan, torch.full((16,), count), fraction)
    assert torch.equal(after.assignment, plan.assignment)
    assert [len(column) for column in moves] == [0, 0, 0]


@given(st.lists(st.integers(1, 6), max_size=12), st.integers(0, 30))
def test_groups_that_fit_are_taken_in_order(sizes, quota):
    expected, left = [], quota
    for position, size in enumerate(sizes):
        if size <= left:
            expected.append(position)
            left -= size
    assert _that_fit(torch.tensor(sizes, dtype=torch.int64), quota).tolist() == expected
