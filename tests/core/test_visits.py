import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_memguard.core.visits import VisitCursor

MEMBERS = torch.tensor([2, 3, 5, 8, 13])


def test_each_pass_is_a_permutation_of_its_own():
    visits = VisitCursor(shard_index=1).peek(MEMBERS, 30, seed=0)
    passes = [[visit.sample_id for visit in visits if visit.pass_index == p] for p in range(6)]
    assert all(sorted(order) == MEMBERS.tolist() for order in passes)
    assert len({tuple(order) for order in passes}) > 1
    assert [visit.pass_index for visit in visits] == sorted(visit.pass_index for visit in visits)
    assert {visit.shard_index for visit in visits} == {1}


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), max_size=8), st.integers(0, 9))
def test_pieces_of_any_size_equal_one_long_look(counts, seed):
    cursor, visits = VisitCursor(0), []
    for count in counts:
        before = dataclasses.replace(cursor)
        visits += cursor.peek(MEMBERS, count, seed)
        assert cursor == before  # looking ahead moves nothing
        cursor.advance(count, len(MEMBERS))
    assert visits == VisitCursor(0).peek(MEMBERS, sum(counts), seed)
    resumed = VisitCursor(**dataclasses.asdict(cursor))
    assert resumed.peek(MEMBERS, 7, seed) == cursor.peek(MEMBERS, 7, seed)


def test_changed_membership_begins_a_pass_whose_number_is_new():
    cursor = VisitCursor(0)
    seen = {visit.pass_index for visit in cursor.peek(MEMBERS, 7, seed=0)}
    cursor.advance(7, len(MEMBERS))
    cursor.begin_pass()
    members = torch.tensor([3, 5, 8, 21])
    visits = cursor.peek(members, 4, seed=0)
    assert sorted(visit.sample_id for visit in visits) == members.tolist()
    assert {visit.pass_index for visit in visits} == {2}
    assert 2 not in seen


def test_order_depends_on_seed_and_shard():
    members = torch.arange(50)
    orders = [VisitCursor(k).peek(members, 50, seed) for k, seed in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(visit.sample_id for visit in order) for order in orders}) == 3
