import dataclasses
from collections import Counter
from itertools import islice

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_memguard.core.sampler import ShardSampler, group_batches, split_by_bucket
from sd_memguard.core.seeding import permutation
from tests.reference.slow_buckets import slow_batches

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


# Batches of one bucket.


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_batches_are_those_of_a_slow_peer(buckets, batch_size, turns, seed):
    """Buckets that change from epoch to epoch, as with several resolutions, and shards smaller than a batch."""
    members, num_epochs = 3 * torch.arange(len(buckets)) + 1, 4
    of = torch.tensor(buckets)

    def bucket_of(sample, epoch):
        return (buckets[sample // 3] + epoch) % turns * 5 + buckets[sample // 3]

    def buckets_of(samples, epoch):
        return (of[samples // 3] + epoch) % turns * 5 + of[samples // 3]

    epochs = [
        members[permutation(seed, "order", 2, epoch, length=len(members))].tolist() for epoch in range(num_epochs)
    ]
    expected = slow_batches(epochs, bucket_of, batch_size)
    found = list(islice(ShardSampler(2).batches(members, batch_size, seed, buckets=buckets_of), len(expected)))
    assert [[(ref.epoch_index, ref.sample_id) for ref in batch] for batch in found] == expected
    assert all(ref.bucket == bucket_of(ref.sample_id, ref.epoch_index) for batch in found for ref in batch)
    # From every batch on, a sampler that has counted the samples goes on alike.
    sampler = ShardSampler(2)
    for number in range(len(found)):
        rest = list(islice(sampler.batches(members, batch_size, seed, buckets=buckets_of), len(found) - number))
        assert rest == found[number:]
        sampler.advance(batch_size, len(members))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 8), st.data())
def test_an_epoch_shows_each_sample_once_and_mixes_as_little_as_it_can(buckets, batch_size, data):
    head = data.draw(st.integers(0, batch_size - 1))
    order = group_batches(torch.tensor(buckets), batch_size, head).tolist()
    assert sorted(order) == list(range(len(buckets)))
    chunks = [[buckets[place] for place in order[at : at + batch_size]] for at in range(head, len(order), batch_size)]
    pure = sum(len(set(chunk)) == 1 for chunk in chunks if len(chunk) == batch_size)
    possible = sum(count // batch_size for count in Counter(buckets).values())
    spare = sum(count % batch_size for count in Counter(buckets).values())
    assert pure >= possible - (head > spare)
    for bucket in set(buckets):
        inside = [place for place in order[head:] if buckets[place] == bucket]
        assert inside == sorted(inside)


def test_one_bucket_changes_nothing():
    plain = islice(ShardSampler(1, 3, 2).batches(MEMBERS, 2, 0), 20)
    one = islice(ShardSampler(1, 3, 2).batches(MEMBERS, 2, 0, buckets=lambda ids, epoch: torch.full_like(ids, 0)), 20)
    assert list(one) == list(plain)


def test_a_batch_is_split_by_bucket_in_the_order_of_its_samples():
    (batch,) = islice(ShardSampler(0).batches(torch.arange(6), 6, 0, buckets=lambda ids, epoch: ids % 3), 1)
    parts = split_by_bucket(batch)
    assert [ref for part in parts for ref in part] == sorted(
        batch, key=lambda ref: [p[0].bucket for p in parts].index(ref.bucket)
    )
    assert all(len({ref.bucket for ref in part}) == 1 for part in parts)
