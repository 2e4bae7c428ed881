import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_memguard.core.ledger import SampleLedger
from sd_memguard.core.rules import AUGMENT, SKIP

NUM_SAMPLES = 6
visits = st.lists(st.tuples(st.integers(0, NUM_SAMPLES - 1), st.sampled_from(["skip", "augment", "clean"])), min_size=1)


def record(ledger, batch):
    actions = [["clean", "skip", "augment"].index(action) for _, action in batch]
    ledger.record(torch.tensor([sample for sample, _ in batch]), torch.tensor(actions))


def make_ledger(num_samples=NUM_SAMPLES):
    return SampleLedger(num_samples, (SKIP, AUGMENT))


@settings(deadline=None)
@given(st.lists(visits, max_size=6))
def test_counts_equal_counting_one_by_one(batches):
    ledger = make_ledger()
    for batch in batches:
        record(ledger, batch)
    every = [visit for batch in batches for visit in batch]
    for sample in range(NUM_SAMPLES):
        bands = [band for other, band in every if other == sample]
        assert ledger.seen[sample] == len(bands)
        assert ledger.actions["skipped"][sample] == bands.count("skip")
        assert ledger.actions["augmented"][sample] == bands.count("augment")
        assert ledger.skips[sample] == bands.count("skip") + bands.count("augment")
        ratio = 0 if not bands else 1 - bands.count("clean") / len(bands)
        assert ledger.skip_ratio()[sample].item() == pytest.approx(ratio)


def test_moves_are_counted_and_skips_start_anew_for_all():
    ledger = make_ledger()
    record(ledger, [(1, "skip"), (1, "augment"), (4, "skip")])
    ledger.record_moves(torch.tensor([1]))
    record(ledger, [(4, "augment")])
    assert ledger.moves.tolist() == [0, 1, 0, 0, 0, 0]
    assert ledger.skips.tolist() == [0, 0, 0, 0, 1, 0]
    assert ledger.actions["skipped"].tolist() == [0, 1, 0, 0, 1, 0]
    assert ledger.actions["augmented"].tolist() == [0, 1, 0, 0, 1, 0]


def test_state_round_trip_and_refusal():
    ledger, fresh = make_ledger(), make_ledger()
    record(ledger, [(0, "skip"), (5, "augment"), (5, "clean")])
    ledger.record_moves(torch.tensor([5]))
    fresh.load_state_dict(ledger.state_dict())
    for name, counts in ledger.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], counts)
    record(ledger, [(0, "skip")])
    assert fresh.seen[0] == 1  # a copy, not the same tensor
    with pytest.raises(ValueError, match="this ledger has 6 samples, the saved one 7"):
        fresh.load_state_dict(make_ledger(7).state_dict())
    with pytest.raises(
        ValueError, match="this ledger counts seen, skipped, augmented, moves, skips, the saved one seen"
    ):
        fresh.load_state_dict(SampleLedger(NUM_SAMPLES, (SKIP,)).state_dict())
