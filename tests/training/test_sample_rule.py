"""A rule of one's own: one file, named by its path, and everything that counts and shows actions knows it."""

import json
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
import torch

from sd_memguard.core.rules import Action, Decision, SampleRule
from sd_memguard.errors import ConfigError
from sd_memguard.inspection.command import main as inspect
from sd_memguard.training.signals import Interrupted
from tests.training.test_trainer import results, stop_at

HALVE = Action("halve", "halved")
RULE = "tests.training.test_sample_rule:HalveTheSeen"


class HalveTheSeen(SampleRule):
    """Halves the gradient of samples at the second and every later time that they are seen."""

    actions: ClassVar[tuple[Action, ...]] = (HALVE,)

    def __init__(self, num_samples: int) -> None:
        self.times_seen = torch.zeros(num_samples)

    @classmethod
    def from_config(cls, config, *, num_timesteps, device):
        return cls(num_samples=64)

    def decide(self, losses, timesteps, sample_ids):
        seen = self.times_seen[sample_ids] > 0
        return Decision(torch.where(seen, 0.5, 1.0), seen.long(), torch.full_like(losses, torch.inf))

    def update(self, losses, timesteps, sample_ids):
        self.times_seen[sample_ids] += 1

    def tensors(self):
        return {"times_seen": self.times_seen}

    def summary(self):
        return {"most_seen": float(self.times_seen.max())}


SETTINGS = {"sample_rule": RULE, "num_shards": 2, "augment_threshold": 0.0, "redistribute_fraction": 0.0}


def test_a_rule_of_ones_own_is_trained_resumed_recorded_and_shown(run, configure, monkeypatch, capsys):
    whole = run("whole", **SETTINGS)
    with monkeypatch.context() as patch:
        stop_at(patch, 15)
        with pytest.raises(Interrupted):
            run("parts", **SETTINGS)
    parts = run("parts", **SETTINGS, resume_from_checkpoint="latest")
    assert results(parts.output_dir) == results(whole.output_dir)

    samples = pq.read_table(whole.output_dir / "memguard" / "samples.parquet").to_pydict()
    # 24 steps of 4 over 24 images in two shards that nothing leaves: each is seen 4 times, and halved after the first.
    assert samples["seen"] == [4] * 24
    assert samples["halved"] == [3] * 24
    rounds = [json.loads(line) for line in Path(whole.output_dir, "memguard", "rounds.jsonl").read_text().splitlines()]
    assert [shard["halved_fraction"] for shard in rounds[0]["shards"]] == [0.0, 0.0]
    assert [shard["halved_fraction"] for shard in rounds[-1]["shards"]] == [1.0, 1.0]
    assert [shard["most_seen"] for shard in rounds[-1]["shards"]] == [4.0, 4.0]

    capsys.readouterr()
    inspect([str(whole.output_dir)])
    assert "halved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("nonsense", "must be one of agc, anchored or"),
        ("tests.nowhere:Rule", "cannot be imported"),
        ("json:dumps", "no `SampleRule`"),
    ],
)
def test_a_rule_that_cannot_be_used_is_refused_before_training(run, configure, rule, message):
    with pytest.raises(ConfigError, match=message):
        run("refused", sample_rule=rule)
    assert not Path(configure("refused").output_dir).exists()
