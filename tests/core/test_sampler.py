import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_memguard.core.sampler import ShardSampler

MEMBERS = torch.tensor([2, 3, 5, 8, 13])


def test_each_pass_is_a_permutation_of_its_own():
    visits = ShardSampler(shard_index=1).peek(MEMBERS, 30, seed=0)
    passes = [[visit.sample_id for visit in visits if visit.epoch_index == p] for p in range(6)]
    assert all(sorted(order) == MEMBERS.tolist() for order in passes)
    assert len({tuple(order) for order in passes}) > 1
    assert [visit.epoch_index for visit in visits] == sorted(visit.epoch_index for visit in visits)
    assert {visit.shard_index for visit in visits} == {1}


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), max_size=8), st.integers(0, 9))
def test_pieces_of_any_size_equal_one_long_look(counts, seed):
    sampler, visits = ShardSampler(0), []
    for count in counts:
        before = dataclasses.replace(sampler)
        visits += sampler.peek(MEMBERS, count, seed)
        assert sampler == before  # looking ahead moves nothing
        sampler.advance(count, len(MEMBERS))
    assert visits == ShardSampler(0).peek(MEMBERS, sum(counts), seed)
    resumed = ShardSampler(**dataclasses.asdict(sampler))
    assert resumed.peek(MEMBERS, 7, seed) == sampler.peek(MEMBERS, 7, seed)


def test_changed_membership_begins_a_pass_whose_number_is_new():
    sampler = ShardSampler(0)
    seen = {visit.epoch_index for visit in sampler.peek(MEMBERS, 7, seed=0)}
    sampler.advance(7, len(MEMBERS))
    sampler.begin_epoch()
    members = torch.tensor([3, 5, 8, 21])
    visits = sampler.peek(members, 4, seed=0)
    assert sorted(visit.sample_id for visit in visits) == members.tolist()
    assert {visit.epoch_index for visit in visits} == {2}
    assert 2 not in seen


def test_order_depends_on_seed_and_shard():
    members = torch.arange(50)
    orders = [ShardSampler(k).peek(members, 50, seed) for k, seed in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(visit.sample_id for visit in order) for order in orders}) == 3


# Passes over groups of duplicates.

GROUPED = torch.tensor([0, 1, 2, 3, 4, 5, 6])
GROUPS = torch.tensor([7, 2, 7, 7, 9, 2, 4])  # {0, 2, 3}, {1, 5}, {4} and {6}


def test_a_balanced_pass_sees_each_group_once_and_passes_show_every_member_in_turn():
    visits = ShardSampler(2).peek(GROUPED, 4 * 12, seed=3, groups=GROUPS)
    passes = [[visit.sample_id for visit in visits if visit.epoch_index == p] for p in range(12)]
    for seen in passes:
        assert sorted(GROUPS[seen].tolist()) == [2, 4, 7, 9]
    for first in range(10):  # any three passes in a row show a group of three whole, any two a group of two
        assert {i for seen in passes[first : first + 3] for i in seen} >= {0, 2, 3}
        assert {i for seen in passes[first : first + 2] for i in seen} >= {1, 5}


def test_which_member_comes_first_depends_on_seed_and_shard():
    firsts = set()
    for shard_index, seed in [(0, seed) for seed in range(12)] + [(shard, 0) for shard in range(12)]:
        seen = {visit.sample_id for visit in ShardSampler(shard_index).peek(GROUPED, 4, seed, GROUPS)}
        firsts.add(tuple(sorted(seen)))
    assert len(firsts) == 6


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), max_size=8), st.integers(0, 9))
def test_pieces_of_balanced_passes_equal_one_long_look(counts, seed):
    sampler, visits = ShardSampler(0), []
    for count in counts:
        visits += sampler.peek(GROUPED, count, seed, GROUPS)
        sampler.advance(count, 4)
    assert visits == ShardSampler(0).peek(GROUPED, sum(counts), seed, GROUPS)


def test_groups_of_one_are_visited_like_samples():
    assert ShardSampler(1).peek(MEMBERS, 13, 0, torch.arange(5)) == ShardSampler(1).peek(MEMBERS, 13, 0)
