import copy
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_memguard.core.memory_bank import MIN_TIMES_SEEN, LossMemoryBank
from tests.reference.slow_guard import SlowBank

MODES = ["paper", "corrected", "smoothed"]
NUM_TIMESTEPS = 50  # more than a window of 41, so that there are timesteps that do not see each other
EVERY = torch.arange(NUM_TIMESTEPS)

# Few timesteps, so that they repeat inside a batch; both ends, the middle, and pairs exactly 20 and 21 apart.
timesteps = st.sampled_from([0, 1, 20, 21, 22, 41, 49])
batches = st.lists(st.lists(st.tuples(timesteps, st.floats(0.01, 4)), min_size=1, max_size=9), max_size=12)


def columns(batch):
    return [t for t, _ in batch], [loss for _, loss in batch]


@settings(deadline=None, max_examples=60)
@given(batches, st.sampled_from(MODES), st.sampled_from([0.0, 0.8]))
def test_bank_equals_the_sequential_rule(history, mode, decay):
    bank, slow = LossMemoryBank(NUM_TIMESTEPS, decay, mode), SlowBank(NUM_TIMESTEPS, decay, mode)
    for batch in history:
        ts, losses = columns(batch)
        ratios = bank.loss_ratio(torch.tensor(ts), torch.tensor(losses)).tolist()
        for t, loss, ratio in zip(ts, losses, ratios, strict=True):
            # An effective number of visits of 5 but for rounding may fall on either side.
            if mode != "smoothed" or abs(slow.effective_visits(t) - 5) > 1e-4:
                assert ratio == pytest.approx(slow.loss_ratio(t, loss), rel=1e-4)
        bank.update(torch.tensor(ts), torch.tensor(losses))
        slow.update(ts, losses)
    expected = [slow.mean(t) for t in range(NUM_TIMESTEPS)]
    assert bank.mean(EVERY).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7, nan_ok=True)


@pytest.mark.parametrize("mode", MODES)
def test_bank_stays_close_to_the_sequential_rule_over_many_batches(mode):
    rng = random.Random(0)
    bank, slow = LossMemoryBank(NUM_TIMESTEPS, 0.8, mode), SlowBank(NUM_TIMESTEPS, 0.8, mode)
    for _ in range(400):
        ts, losses = [rng.randrange(NUM_TIMESTEPS) for _ in range(16)], [rng.lognormvariate(-3, 1) for _ in range(16)]
        bank.update(torch.tensor(ts), torch.tensor(losses))
        slow.update(ts, losses)
    torch.testing.assert_close(bank.mean(EVERY), torch.tensor([slow.mean(t) for t in EVERY]), rtol=1e-5, atol=0)


def test_golden_values_of_a_timestep_that_repeats():
    # By hand: 1, 2, 4 at one timestep. Paper: .2 -> .16+.4=.56 -> .448+.8=1.248. Corrected: 1.248/(1-.8^3)=1.248/.488.
    # Smoothed: (4 + .8*2 + .64*1) / (1 + .8 + .64) = 6.24 / 2.44, the same number.
    for mode, expected in {"paper": 1.248, "corrected": 1.248 / 0.488, "smoothed": 6.24 / 2.44}.items():
        bank = LossMemoryBank(4, 0.8, mode)
        bank.update(torch.tensor([2, 2, 2]), torch.tensor([1.0, 2.0, 4.0]))
        assert bank.mean(torch.tensor([2])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_equals_its_samples_one_by_one(mode):
    ts, losses = torch.tensor([3, 3, 9, 3]), torch.tensor([0.5, 2.0, 1.0, 0.25])
    together, alone = LossMemoryBank(NUM_TIMESTEPS, mode=mode), LossMemoryBank(NUM_TIMESTEPS, mode=mode)
    together.update(ts, losses)
    for i in range(4):
        alone.update(ts[i : i + 1], losses[i : i + 1])
    torch.testing.assert_close(together.mean(EVERY), alone.mean(EVERY), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_mean_where_never_visited(mode):
    bank = LossMemoryBank(NUM_TIMESTEPS, mode=mode)
    assert all(math.isnan(value) == (mode != "paper") for value in bank.mean(EVERY).tolist())
    assert bank.mean(EVERY).nan_to_num().eq(0).all()
    assert bank.loss_ratio(EVERY, torch.ones(NUM_TIMESTEPS)).isposinf().all()


@pytest.mark.parametrize(("mode", "needed"), [("paper", 1), ("corrected", 3), ("smoothed", 5)])
def test_no_decision_before_the_minimum_of_visits(mode, needed):
    assert MIN_TIMES_SEEN[mode] in {needed, needed - 1}
    bank = LossMemoryBank(NUM_TIMESTEPS, 0.8, mode)
    for visit in range(needed):
        assert bank.loss_ratio(torch.tensor([10]), torch.tensor([0.1])).isposinf()
        # Smoothed visits fade where they repeat, so that here each falls on a timestep of its own.
        t = 10 + visit if mode == "smoothed" else 10
        bank.update(torch.tensor([t]), torch.tensor([1.0]))
    expected = 0.1 / 0.2 if mode == "paper" else 0.1
    assert bank.loss_ratio(torch.tensor([10]), torch.tensor([0.1])).item() == pytest.approx(expected)


def test_window_reaches_twenty_timesteps_and_ends_at_the_edges():
    bank = LossMemoryBank(100, mode="smoothed")
    bank.update(torch.tensor([0, 99]), torch.tensor([2.0, 8.0]))
    seen = bank.mean(torch.arange(100))
    assert (seen[:21] == 2).all()
    assert seen[21:79].isnan().all()
    assert (seen[79:] == 8).all()


@pytest.mark.parametrize("mode", MODES)
def test_decay_zero_remembers_the_last_loss(mode):
    bank = LossMemoryBank(100, 0.0, mode)
    bank.update(torch.tensor([50, 50]), torch.tensor([7.0, 3.0]))
    bank.update(torch.tensor([5]), torch.tensor([9.0]))
    assert bank.mean(torch.tensor([50, 5])).tolist() == [3, 9]


@pytest.mark.parametrize("mode", MODES)
def test_losses_that_are_not_finite_leave_the_bank_alone(mode):
    bank, other = LossMemoryBank(9, mode=mode), LossMemoryBank(9, mode=mode)
    bank.update(torch.tensor([1, 1, 2, 1]), torch.tensor([1.0, math.nan, math.inf, 2.0]))
    other.update(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
    for name in ("sums", "counts", "times_seen"):
        assert torch.equal(bank.state_dict()[name], other.state_dict()[name])


def test_losses_keep_their_graph_out_of_the_bank():
    losses = torch.ones(2, requires_grad=True)
    bank = LossMemoryBank(4)
    bank.update(torch.tensor([0, 1]), losses)
    assert not bank.mean(torch.tensor([0])).requires_grad
    assert not bank.loss_ratio(torch.tensor([0, 1]), losses).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_state_round_trip_continues_identically(mode):
    bank = LossMemoryBank(NUM_TIMESTEPS, mode=mode)
    bank.update(torch.tensor([1, 1, 30]), torch.tensor([0.1, 0.3, 0.7]))
    fresh = LossMemoryBank(NUM_TIMESTEPS, mode=mode)
    fresh.load_state_dict(copy.deepcopy(bank.state_dict()))
    for either in (bank, fresh):
        either.update(torch.tensor([1, 2]), torch.tensor([0.5, 0.9]))
    assert torch.equal(bank.mean(EVERY).nan_to_num(-1), fresh.mean(EVERY).nan_to_num(-1))


@pytest.mark.parametrize(
    "other", [LossMemoryBank(9, 0.8, "paper"), LossMemoryBank(10, 0.7, "paper"), LossMemoryBank(10, 0.8, "corrected")]
)
def test_state_of_another_bank_is_refused(other):
    bank = LossMemoryBank(10, 0.8, "paper")
    bank.update(torch.tensor([3]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"this memory bank is .*paper/0\.8 \(10,\), the saved one is"):
        bank.load_state_dict(other.state_dict())
    assert bank.times_seen.sum() == 1


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`mode` must be one of paper, corrected, smoothed, got 'median'"):
        LossMemoryBank(mode="median")
    for decay in (-0.1, 1):
        with pytest.raises(ValueError, match=f"`decay` must be at least 0 and below 1, got {decay}"):
            LossMemoryBank(decay=decay)


def test_processes_that_share_a_batch_decide_the_same(monkeypatch):
    """CUDA's ``index_add_`` adds float numbers of one place in whatever order its threads come."""
    add, order = torch.Tensor.index_add_, random.Random(0)

    def index_add(tensor, dim, index, source, **options):
        shuffled = torch.tensor(order.sample(range(len(index)), len(index)))
        return add(tensor, dim, index[shuffled], source[shuffled], **options)

    monkeypatch.setattr(torch.Tensor, "index_add_", index_add)
    banks = [LossMemoryBank(3, 0.8) for _ in range(4)]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ts = torch.randint(0, 3, (64,), generator=generator)
        losses = torch.rand(64, generator=generator)
        for bank in banks:
            bank.update(ts, losses)
    assert all(torch.equal(bank.sums, banks[0].sums) for bank in banks)
    assert all(torch.equal(bank.counts, banks[0].counts) for bank in banks)
