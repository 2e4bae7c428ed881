import copy
import random

import pytest
import torch

from sd_memguard.config import GuardConfig
from sd_memguard.core.augmentation import augment_strength
from sd_memguard.guard import MemorizationGuard
from tests.reference.slow_guard import SlowBank, slow_band, slow_magnitude

NUM_SAMPLES, NUM_TIMESTEPS = 20, 6


def make_guard(**settings):
    extra = {name: settings.pop(name) for name in ("exclude", "groups", "augments") if name in settings}
    defaults = {"num_shards": 2, "augment_threshold": 1.2, "bank_mode": "paper", "group_duplicates": "shard", "seed": 0}
    config = GuardConfig(**{**defaults, **settings})
    return MemorizationGuard(config, NUM_SAMPLES, num_timesteps=NUM_TIMESTEPS, **extra)


def random_batch(rng, size=4):
    losses = torch.tensor([rng.uniform(0.1, 1) for _ in range(size)], requires_grad=True)
    timesteps = torch.tensor([rng.randrange(NUM_TIMESTEPS) for _ in range(size)])
    return losses, timesteps, torch.tensor([rng.randrange(NUM_SAMPLES) for _ in range(size)])


def feed(guard, num_batches=30, seed=0):
    """Weigh random batches on alternating shards and return the verdicts."""
    rng, verdicts = random.Random(seed), []
    for number in range(num_batches):
        guard.shard_index = number % guard.num_shards
        verdicts.append(guard.weigh(*random_batch(rng)))
    return verdicts


def assert_same_state(one, other):
    """Compare nested states, tensors to the bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same_state(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same_state(left, right)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("weighted", [False, True])
def test_verdicts_equal_the_plain_formula(weighted):
    guard, slow, rng = make_guard(num_shards=1), SlowBank(NUM_TIMESTEPS, 0.8, "paper"), random.Random(1)
    counts = {"skip": 0, "augment": 0, "clean": 0}
    for _ in range(60):
        losses, timesteps, sample_ids = random_batch(rng)
        weights = [rng.uniform(0.1, 5) if weighted else 1.0 for _ in range(4)]
        verdict = guard.weigh(losses, timesteps, sample_ids, torch.tensor(weights) if weighted else None)
        ratios = [slow.loss_ratio(t, loss) for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True)]
        slow.update(timesteps.tolist(), losses.tolist())
        bands = [slow_band(ratio, 0.8, 1.2) for ratio in ratios]

        assert verdict.loss_ratio.tolist() == pytest.approx(ratios, rel=1e-4)
        assert verdict.skip_mask.tolist() == [band == "skip" for band in bands]
        assert verdict.augment_mask.tolist() == [band == "augment" for band in bands]
        found = (verdict.num_skipped, verdict.num_augmented, verdict.num_clean)
        assert found == tuple(bands.count(band) for band in counts)
        assert torch.equal(verdict.losses, losses.detach())

        shares = [w * (band == "clean") for w, band in zip(weights, bands, strict=True)]
        total = sum(share * loss for share, loss in zip(shares, losses.tolist(), strict=True))
        num_clean = max(bands.count("clean"), 1)
        assert verdict.loss_sum.item() == pytest.approx(total, rel=1e-5)
        assert verdict.loss.item() == pytest.approx(total / num_clean, rel=1e-5)
        verdict.loss.backward()
        assert losses.grad.tolist() == pytest.approx([share / num_clean for share in shares], rel=1e-5)
        counts = {band: count + bands.count(band) for band, count in counts.items()}
    assert min(counts.values()) > 20


def test_weights_scale_the_loss_but_not_the_decision():
    plain, weighted, rng = make_guard(), make_guard(), random.Random(2)
    for _ in range(30):
        batch = random_batch(rng)
        one, other = plain.weigh(*batch), weighted.weigh(*batch, torch.full((4,), 3.0))
        assert torch.equal(one.skip_mask, other.skip_mask)
        assert torch.equal(one.augment_mask, other.augment_mask)
        torch.testing.assert_close(3 * one.loss, other.loss)
    assert_same_state(plain.state_dict(), weighted.state_dict())


def test_a_batch_without_clean_samples_has_a_loss_of_zero_and_no_gradient():
    guard = make_guard()
    guard.rules[0].bank.update(torch.tensor([0] * 20), torch.ones(20))
    losses = torch.full((3,), 0.1, requires_grad=True)
    verdict = guard.weigh(losses, torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
    assert (verdict.num_clean, verdict.num_skipped, verdict.loss.item()) == (0, 3, 0)
    verdict.loss.backward()
    assert losses.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", ["paper", "corrected", "smoothed"])
def test_neutral_guard_gives_the_mean_loss_to_the_bit(mode):
    config = GuardConfig.off()
    guard = make_guard(num_shards=config.num_shards, skip_threshold=0.0, bank_mode=mode)
    off = MemorizationGuard(config, NUM_SAMPLES, num_timesteps=NUM_TIMESTEPS)
    rng = random.Random(3)
    for _ in range(40):
        batch = random_batch(rng)
        for each in (guard, off):
            verdict = each.weigh(*batch)
            assert torch.equal(verdict.loss, batch[0].sum() / 4)
            assert verdict.num_clean == 4
            assert each.take_augment_batch(1) is None
    assert not off.redistributes
    assert off.ledger.skips.sum() == 0
    assert off.plan.members(0).tolist() == list(range(NUM_SAMPLES))


def test_each_proxy_has_its_own_bank_and_queue():
    guard = make_guard()
    losses, sample_ids = torch.tensor([1.0]), torch.tensor([4])
    for shard in (0, 1):
        guard.shard_index = shard
        assert guard.weigh(losses, torch.tensor([2]), sample_ids).loss_ratio.isposinf()
    guard.shard_index = 0
    assert guard.weigh(losses * 0.2, torch.tensor([2]), sample_ids).augment_mask.all()
    guard.shard_index = 1
    assert guard.take_augment_batch(1) is None
    guard.shard_index = 0
    waiting = guard.take_augment_batch(1)
    # The bank stands at .2, the ratio is 1: strength exp(-1.25) = .2865, magnitude int(1.43).
    assert waiting == ([4], 1)


@pytest.mark.parametrize("surplus", ["keep", "drop"])
def test_augment_batches_hold_what_was_queued_first(surplus):
    guard = make_guard(num_shards=1, augment_surplus=surplus)
    queued = []
    for verdict, sample_ids in replay(guard):
        ratios = verdict.loss_ratio[verdict.augment_mask]
        queued += zip(sample_ids[verdict.augment_mask].tolist(), augment_strength(ratios, 0.8).tolist(), strict=True)
        if len(queued) < 3:
            assert guard.take_augment_batch(3) is None
            continue
        taken, queued = queued[:3], queued[3:] if surplus == "keep" else []
        assert guard.take_augment_batch(3) == ([i for i, _ in taken], slow_magnitude([s for _, s in taken]))
    assert guard.ledger.actions["augmented"].sum() > 20


def replay(guard):
    rng = random.Random(4)
    for _ in range(60):
        batch = random_batch(rng)
        yield guard.weigh(*batch), batch[2]


def test_where_nobody_augments_there_are_two_bands():
    guard = make_guard(augments=False)
    verdicts = feed(guard)
    assert sum(verdict.num_augmented for verdict in verdicts) == 0
    assert sum(verdict.num_skipped for verdict in verdicts) > 0
    assert all(len(queue) == 0 for queue in guard.queues)


def test_redistribution_moves_the_most_skipped_and_counts_anew():
    guard = make_guard(redistribute_fraction=0.2)
    before = [guard.plan.members(k).tolist() for k in range(2)]
    favourites = [before[0][3], before[0][7], before[1][5]]
    guard.rules[0].bank.update(torch.tensor([0] * 20), torch.ones(20))
    for sample in favourites:
        guard.weigh(torch.tensor([0.1]), torch.tensor([0]), torch.tensor([sample]))
    moves = guard.redistribute()
    assert sorted(moves.sample_ids.tolist()) == sorted(favourites)
    assert set(favourites[:2]) <= set(guard.plan.members(1).tolist())
    assert favourites[2] in guard.plan.members(0)
    assert guard.ledger.moves.sum() == 3
    assert guard.ledger.skips.sum() == 0
    assert guard.ledger.actions["skipped"].sum() == 3
    assert guard.aggregation_weights() == [9.0, 11.0]


def test_aggregation_weights_are_sizes_or_equal():
    exclude = torch.tensor([7])
    assert make_guard(num_shards=3, exclude=exclude).aggregation_weights() == [7.0, 6.0, 6.0]
    assert make_guard(num_shards=3, exclude=exclude, shard_weights="equal").aggregation_weights() == [1.0, 1.0, 1.0]


def test_groups_stay_together():
    groups = torch.arange(NUM_SAMPLES) // 4
    guard = make_guard(groups=groups, redistribute_fraction=0.5)
    guard.ledger.skips += torch.arange(NUM_SAMPLES).int()
    assert len(guard.redistribute().sample_ids) > 0
    for group in range(5):
        assert len(set(guard.plan.assignment[groups == group].tolist())) == 1


GROUPS = torch.tensor([0] * 8 + list(range(8, NUM_SAMPLES)))  # eight copies of one image and twelve others


def test_a_balanced_group_counts_as_one_image_everywhere():
    shard, balance = (make_guard(groups=GROUPS, group_duplicates=mode) for mode in ("shard", "balance"))
    assert shard.epoch_lengths() == shard.plan.sizes() == [10, 10]
    assert shard.aggregation_weights() == [10, 10]
    assert shard.balanced_groups is None
    assert sorted(balance.epoch_lengths()) == [6, 7]
    assert sorted(balance.plan.sizes()) in ([6, 14], [7, 13])
    assert balance.aggregation_weights() == balance.epoch_lengths()
    assert torch.equal(balance.balanced_groups, GROUPS)


def test_groups_that_the_setting_forgets_or_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`group_duplicates` is 'off'"):
        make_guard(groups=GROUPS, group_duplicates="off")
    with pytest.raises(ValueError, match=r"shape \(20,\)"):
        make_guard(groups=GROUPS[1:])


def test_a_saved_state_brings_its_groups():
    saved = make_guard(groups=GROUPS, group_duplicates="balance")
    other = make_guard(groups=torch.arange(NUM_SAMPLES), group_duplicates="balance")
    other.load_state_dict(saved.state_dict())
    assert_same_state(other.state_dict(), saved.state_dict())
    assert other.epoch_lengths() == saved.epoch_lengths()


def test_a_seed_is_drawn_where_none_is_given():
    one, other = (make_guard(seed=None) for _ in range(2))
    assert one.seed != other.seed
    other.load_state_dict(one.state_dict())
    assert other.seed == one.seed


def test_state_round_trip_continues_identically():
    guard = make_guard()
    feed(guard)
    guard.redistribute()
    feed(guard, seed=1)
    saved = copy.deepcopy(guard.state_dict())
    assert sum(map(len, guard.queues)) > 0
    resumed = make_guard(seed=9)
    resumed.load_state_dict(saved)
    for each in (guard, resumed):
        feed(each, seed=2)
        each.take_augment_batch(3)
        each.redistribute()
        feed(each, seed=3)
    assert_same_state(guard.state_dict(), resumed.state_dict())
    # The state that was loaded is not shared with the guard.
    third = make_guard()
    third.load_state_dict(saved)
    assert not torch.equal(third.ledger.seen, resumed.ledger.seen)


def damaged(state, kind):
    if kind == "kind":
        state["kind"] = "SampleGuard-0"
    if kind == "ledger":
        state["ledger"] = {name: counts[:-1] for name, counts in state["ledger"].items()}
    if kind == "rules":
        state["rules"][1]["kind"] = "LossMemoryBank-1/smoothed/0.8"
    return state


@pytest.mark.parametrize("kind", ["kind", "ledger", "rules"])
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(kind):
    other = make_guard(seed=5)
    feed(other, seed=6)
    guard = make_guard()
    feed(guard)
    before = copy.deepcopy(guard.state_dict())
    with pytest.raises(ValueError, match=r"expects|memory bank is|ledger has"):
        guard.load_state_dict(damaged(copy.deepcopy(other.state_dict()), kind))
    assert_same_state(guard.state_dict(), before)


def test_a_state_of_another_run_is_refused():
    guard = make_guard()
    for other in (make_guard(num_shards=3), MemorizationGuard(GuardConfig(num_shards=2, seed=0), NUM_SAMPLES + 1)):
        with pytest.raises(ValueError, match=r"the guard expects \(kind, shards, samples\) = .*, the saved state has"):
            guard.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="this memory bank is"):
        guard.load_state_dict(make_guard(bank_decay=0.7).state_dict())


@pytest.mark.parametrize(
    ("losses", "timesteps", "sample_ids"), [((4, 1), (4,), (4,)), ((4,), (3,), (4,)), ((4,), (4,), (5,)), ((), (), ())]
)
def test_shapes_that_differ_are_refused(losses, timesteps, sample_ids):
    guard = make_guard()
    shapes = torch.ones(losses), torch.zeros(timesteps, dtype=torch.int64), torch.zeros(sample_ids, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"must be of shape .*, got .*; reduce the loss over all dim"):
        guard.weigh(*shapes)


@pytest.mark.parametrize("shape", [(4, 1), (1,), (), (3,)])
def test_weights_of_another_shape_are_refused(shape):
    guard, before = make_guard(), make_guard()
    ids = torch.arange(4)
    with pytest.raises(ValueError, match=r"`weights` must be of the shape of `losses`, \(4,\), got"):
        guard.weigh(torch.ones(4), ids, ids, torch.ones(shape))
    assert_same_state(guard.state_dict(), before.state_dict())


@pytest.mark.parametrize("stranger", [-1, NUM_SAMPLES])
def test_a_sample_of_another_data_set_is_refused_before_anything_changes(stranger):
    guard, before = make_guard(), make_guard()
    with pytest.raises(ValueError, match=f"`sample_ids` must be between 0 and 19, got .*{stranger}.*; give each"):
        guard.weigh(torch.ones(2), torch.tensor([0, 1]), torch.tensor([0, stranger]))
    assert_same_state(guard.state_dict(), before.state_dict())
