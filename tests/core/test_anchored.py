"""The rule `anchored`: what is normal comes from held-back images alone."""

from types import SimpleNamespace

import pytest
import torch

from sd_memguard.config import GuardConfig
from sd_memguard.core.rules import AnchoredControl
from sd_memguard.core.rules.anchored import HOLD_BACK, MIN_RATIOS, NUM_RATIOS
from sd_memguard.core.rules.base import SKIP
from sd_memguard.defaults import resolve_sample_rule
from sd_memguard.sample_guard import SampleGuard

NUM_SAMPLES = 2000
GENERATOR = torch.Generator().manual_seed(0)


def batch(size=64):
    """Samples with timesteps whose usual loss grows with the timestep, by a factor of 0.8 to 1.2 each."""
    ids = torch.randint(NUM_SAMPLES, (size,), generator=GENERATOR)
    timesteps = torch.randint(1000, (size,), generator=GENERATOR)
    spread = 0.8 + 0.4 * torch.rand(size, generator=GENERATOR)
    return (0.1 + timesteps / 1000) * spread, timesteps, ids


@pytest.fixture
def rule():
    """A rule that has seen many batches in which all images are equally familiar."""
    rule = AnchoredControl(1000)
    for _ in range(400):
        rule.update(*batch())
    return rule


def test_the_share_of_anchors_is_as_set_and_theirs_is_no_gradient(rule):
    ids = torch.arange(NUM_SAMPLES)
    assert rule.is_held_back(ids).float().mean() == pytest.approx(0.05, abs=0.002)
    losses, timesteps, _ = batch(NUM_SAMPLES)
    decision = rule.decide(losses * 0.01, timesteps, ids)
    held_back = decision.actions == rule.actions.index(HOLD_BACK) + 1
    assert torch.equal(held_back, rule.is_held_back(ids))
    assert (decision.weights[held_back] == 0).all()


def test_about_the_quantile_is_skipped_where_nothing_is_memorized(rule):
    losses, timesteps, ids = batch(20_000)
    trained = ~rule.is_held_back(ids)
    skipped = rule.decide(losses, timesteps, ids).actions == rule.actions.index(SKIP) + 1
    assert skipped[trained].float().mean() == pytest.approx(0.05, abs=0.02)


def test_memorized_samples_are_skipped_even_if_all_are_equally_memorized(rule):
    """The ratio to the mean of the training losses would be 1 for all of them."""
    losses, timesteps, ids = batch(5000)
    skipped = rule.decide(losses * 0.6, timesteps, ids).actions == rule.actions.index(SKIP) + 1
    assert skipped[~rule.is_held_back(ids)].float().mean() > 0.95


def test_other_samples_leave_no_trace(rule):
    before = {name: tensor.clone() for name, tensor in rule.tensors().items()}
    losses, timesteps, ids = batch()
    others = ~rule.is_held_back(ids)
    rule.update(losses[others] * 0.1, timesteps[others], ids[others])
    assert all(torch.equal(tensor, before[name]) for name, tensor in rule.tensors().items())


def test_nothing_is_skipped_before_enough_anchors_were_seen():
    rule = AnchoredControl(1000)
    anchors = torch.arange(NUM_SAMPLES)[rule.is_held_back(torch.arange(NUM_SAMPLES))]
    for _ in range(MIN_RATIOS - 1):  # one of each band
        rule.update(torch.ones(5), torch.tensor([100, 300, 500, 700, 900]), anchors[:5])
    losses, timesteps, ids = batch()
    assert (rule.decide(losses * 0, timesteps, ids).actions != rule.actions.index(SKIP) + 1).all()


def test_old_ratios_are_forgotten(rule):
    """The quantile is that of the last ratios: a mean that trails a falling loss is trailed by the anchors, too."""
    ids = torch.arange(NUM_SAMPLES)
    anchors = ids[rule.is_held_back(ids)]
    for _ in range(2 * NUM_RATIOS // len(anchors) + 1):
        losses, timesteps, _ = batch(len(anchors))
        rule.update(losses * 0.5, timesteps, anchors)
    losses, timesteps, ids = batch(5000)
    skipped = rule.decide(losses * 0.5, timesteps, ids).actions == rule.actions.index(SKIP) + 1
    assert skipped[~rule.is_held_back(ids)].float().mean() < 0.25


def test_saved_state_gives_the_same_decisions_and_other_settings_are_refused(rule):
    other = AnchoredControl(1000)
    other.load_state_dict(rule.state_dict())
    losses, timesteps, ids = batch(500)
    for one, two in zip(rule.decide(losses, timesteps, ids), other.decide(losses, timesteps, ids), strict=True):
        assert torch.equal(one, two)
    other.update(losses, timesteps, ids)
    assert int(other.num_ratios) > int(rule.num_ratios)
    with pytest.raises(ValueError, match=r"the saved one is AnchoredControl-1/0\.05"):
        AnchoredControl(1000, fraction=0.1).load_state_dict(rule.state_dict())


def test_near_duplicates_share_their_fate():
    """Groups of four: all members of an anchor are held back, and members alone count as one image."""
    groups = torch.arange(NUM_SAMPLES) // 4
    guard = SampleGuard(GuardConfig(seed=0, num_shards=1), NUM_SAMPLES, groups=groups)
    assert guard.sample_rule == "anchored"
    ids = torch.arange(NUM_SAMPLES)
    verdict = guard.weigh(torch.ones(NUM_SAMPLES), torch.full((NUM_SAMPLES,), 500), ids)
    held_back = verdict.mask(HOLD_BACK).view(-1, 4)
    assert torch.equal(held_back.any(1), held_back.all(1))
    assert 0.03 < held_back.float().mean() < 0.07
    assert guard.ledger.columns()["held_back"].sum() == held_back.sum()
    assert (guard.ledger.skip_ratio() == 0).all()


@pytest.mark.parametrize(
    ("num_images", "num_shards", "settings", "expected"),
    [
        (512, 1, {}, "anchored"),
        (512, 4, {}, "agc"),
        (100, 1, {}, "agc"),
        (None, 1, {}, "agc"),
        (512, 1, {"augment_threshold": 1.2}, "agc"),
        (512, 1, {"skip_threshold": 0.0}, "agc"),
        (None, 1, {"sample_rule": "anchored"}, "anchored"),
    ],
)
def test_auto(num_images, num_shards, settings, expected):
    assert resolve_sample_rule(GuardConfig(**settings), num_images, num_shards) == expected


def test_samples_without_ids_are_refused():
    rule = AnchoredControl.from_config(
        SimpleNamespace(anchor_fraction=0.05, skip_quantile=0.05, bank_decay=0.8), num_timesteps=10, device="cpu"
    )
    with pytest.raises(ValueError, match="needs sample ids"):
        rule.decide(torch.ones(2), torch.ones(2, dtype=torch.int64), None)
