"""What a run writes down of its banks and rounds."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from sd_memguard.core.memory_bank import LossMemoryBank
from sd_memguard.core.rules import AntiGradientControl
from sd_memguard.runs.records import RunRecords


def rule_of(bank):
    return AntiGradientControl(bank, skip_threshold=0.8)


@pytest.fixture
def banks():
    """Return a bank of each mode that has seen timestep 1 four times and 3 once."""
    made = []
    for mode in ("paper", "corrected", "smoothed"):
        bank = LossMemoryBank(60, decay=0.5, mode=mode)
        bank.update(torch.tensor([1, 1, 1, 1, 3]), torch.tensor([1.0, 1.0, 1.0, 1.0, 4.0]))
        made.append(bank)
    return made


def test_banks_by_hand(tmp_path, banks):
    RunRecords(tmp_path).write_curves([rule_of(bank) for bank in banks])
    tensors = load_file(tmp_path / "memguard/banks.safetensors")
    assert set(tensors) == {f"shard_{k}.{name}" for k in range(3) for name in ("mean", "times_seen")}
    paper, corrected, smoothed = (tensors[f"shard_{k}.mean"] for k in range(3))
    assert paper[[1, 3]].tolist() == [1 - 0.5**4, 2.0]
    assert corrected[[1, 3]].tolist() == [1.0, 4.0]
    # Decayed sums over the decayed counts of both timesteps, wherever the window reaches both.
    assert smoothed[10].item() == pytest.approx((1.875 + 4) / (1.875 + 1))
    for curve, known in ((paper, 2), (corrected, 2), (smoothed, 24)):
        assert int(curve.isfinite().sum()) == known
    assert tensors["shard_0.times_seen"].nonzero().flatten().tolist() == [1, 3]
    assert tensors["shard_0.times_seen"].sum() == 5


def test_a_bank_in_two_numbers(banks):
    paper, corrected, smoothed = (rule_of(bank).summary() for bank in banks)
    assert paper == {"bank_mean": pytest.approx((0.9375 + 2) / 2), "bank_coverage": pytest.approx(2 / 60)}
    assert corrected == {"bank_mean": 2.5, "bank_coverage": pytest.approx(1 / 60)}  # three visits are due
    assert smoothed["bank_coverage"] == 0  # five effective ones are
    assert rule_of(LossMemoryBank(10)).summary() == {"bank_mean": None, "bank_coverage": 0.0}
    assert LossMemoryBank(10, mode="paper").curve().isnan().all()


def test_what_is_not_finite_becomes_null(tmp_path):
    row = {"round": 1, "heldout_loss_error": math.nan, "shards": [{"loss": math.inf, "steps": 2}]}
    RunRecords(tmp_path).write_rounds([row])
    expected = {"round": 1, "heldout_loss_error": None, "shards": [{"loss": None, "steps": 2}]}
    assert json.loads((tmp_path / "memguard/rounds.jsonl").read_text()) == expected
