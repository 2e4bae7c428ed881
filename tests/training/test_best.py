"""The best model: what is exported is what a run to that step would have given, and what stops early can go on."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sd_memguard.config import ConfigError
from sd_memguard.export.hub import model_card
from sd_memguard.inspection.command import main as inspect
from sd_memguard.runs.checkpoint import list_checkpoints
from sd_memguard.training.best import best_round, is_patience_over, relative_gap
from sd_memguard.training.build import make_accelerator
from sd_memguard.training.plan import held_back_ids, make_plan
from sd_memguard.training.signals import Interrupted
from sd_memguard.training.trainer import Trainer
from sd_memguard.training.validation import MAX_IMAGES
from tests.training.test_trainer import results, stop_at, weights

ROUND = 2
"""Steps of a proxy per round."""
ONE = {"num_shards": 1, "steps_per_round": ROUND, "max_train_steps": 12, "augment_threshold": 0.0}
SPOILED = {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:6,100", "learning_rate": 1e-2}
"""After six steps the learning rate spoils the model."""
AVERAGED = {"num_shards": 3, "redistribute_fraction": 0.0}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "memguard/rounds.jsonl").read_text().splitlines()]


def heldout_losses(folder: Path) -> list[float]:
    return [row["heldout_loss"] for row in rows(folder)]


@pytest.mark.parametrize("seed", range(20))
def test_the_best_round_and_the_patience_are_those_of_a_slow_peer(seed):
    generator = np.random.default_rng(seed)
    losses = generator.choice([0.1, 0.2, 0.3, math.nan, None], size=8)
    seen = []
    for number, loss in enumerate(losses, start=1):
        seen.append({"round": number, **({} if loss is None else {"heldout_loss": loss})})
        lowest, at = math.inf, None
        for row in seen:
            if row.get("heldout_loss", math.inf) < lowest:
                lowest, at = row["heldout_loss"], row["round"]
        best = best_round(seen)
        assert (best and best["round"]) == at
        for patience in range(4):
            assert is_patience_over(seen, patience) == (at is not None and 0 < patience <= number - at)


def test_no_round_beyond_the_gap_is_the_best_unless_there_is_none_before():
    seen = [
        {"round": number, "heldout_loss": loss, "relative_gap": gap}
        for number, (loss, gap) in enumerate([(0.3, 0.1), (0.2, 0.2), (0.1, 0.3)], start=1)
    ]
    assert [best_round(seen, most)["round"] for most in (0.0, 0.05, 0.1, 0.25, 0.9)] == [3, 1, 1, 2, 3]


def test_the_relative_gap_says_how_much_further_the_training_loss_fell():
    before = {"train_loss": 0.2, "heldout_loss": 0.1}  # harder images
    for share in (0.0, 0.3, 0.9):
        now = {"train_loss": 0.2 * 0.5 * (1 - share), "heldout_loss": 0.1 * 0.5}
        assert relative_gap(now, before) == pytest.approx(share)
    assert math.isnan(relative_gap({"train_loss": 0.2, "heldout_loss": 0.0}, before))


def test_it_stops_at_the_first_round_beyond_the_gap_and_keeps_one_before(run, wide_images, monkeypatch, caplog):
    monkeypatch.setattr("sd_memguard.training.trainer.relative_gap", lambda row, before: row["round"] / 10)
    settings = {**ONE, "validation_data_dir": str(wide_images), "load_best_model_at_end": True}
    settings |= {"checkpointing_steps": 3}
    whole = run("whole", **settings)
    stopped = run("stopped", **settings, early_stopping_gap=0.25)
    assert rows(stopped.output_dir) == rows(whole.output_dir)[:3]
    kept = min(rows(whole.output_dir)[:2], key=lambda row: row["heldout_loss"])
    assert stopped.summary["stopped_early"]
    assert (stopped.summary["kept_step"], stopped.summary["relative_gap"]) == (kept["global_step"], kept["round"] / 10)
    again = run("stopped", **settings, early_stopping_gap=0.25, resume_from_checkpoint="latest")
    assert again.global_step == stopped.global_step
    longer = run("stopped", **settings, early_stopping_gap=0.9, resume_from_checkpoint="latest")
    assert results(longer.output_dir) == results(whole.output_dir)
    assert "a smaller --steps_per_round" not in caplog.text
    first = run("first", **settings, early_stopping_gap=0.05)
    assert first.global_step == first.summary["kept_step"] == ROUND
    assert "a smaller --steps_per_round" in caplog.text


def test_the_gap_of_a_resumed_run_counts_from_the_base_model(run, wide_images, monkeypatch):
    settings = {**ONE, "validation_data_dir": str(wide_images), "checkpointing_steps": 1}
    whole = run("whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)  # in the first round
        with pytest.raises(Interrupted):
            run("parts", **settings)
    parts = run("parts", **settings, resume_from_checkpoint="latest")
    gaps = [row["relative_gap"] for row in rows(parts.output_dir)]
    assert gaps == [row["relative_gap"] for row in rows(whole.output_dir)]
    assert all(map(math.isfinite, gaps))


def test_few_images_are_measured_at_more_timesteps(configure, wide_images):
    plan = make_plan(configure("plan", **ONE, validation_data_dir=str(wide_images)))
    trainer = Trainer(plan, make_accelerator(plan.config))
    for probe in trainer.validator.probes.values():
        number = sum(len(ids) for ids, _ in probe.batches)
        assert MAX_IMAGES // 2 < number * probe.num_parts // 4 <= MAX_IMAGES


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="one-shard"),
        pytest.param({**AVERAGED, "max_train_steps": 24, "lr_step_rules": "1:12,100"}, id="three-shards"),
        pytest.param({"proxy": "lora", "rank": 4, "learning_rate": 0.03}, id="lora"),
        pytest.param({"use_ema": True}, id="ema"),
    ],
)
def test_the_kept_model_is_that_of_a_run_to_its_step(run, wide_images, settings):
    settings = {**ONE, **SPOILED, "validation_data_dir": str(wide_images), **settings}
    kept = run("kept", **settings, load_best_model_at_end=True)
    losses = heldout_losses(kept.output_dir)
    best = int(np.argmin(losses))
    assert 0 < best < len(losses) - 1, losses
    step = rows(kept.output_dir)[best]["global_step"]
    assert (kept.summary["kept_step"], kept.summary["heldout_loss"]) == (step, losses[best])
    assert not kept.summary["stopped_early"]
    short = run("short", **{**settings, "max_train_steps": step})
    last = run("last", **settings)
    assert heldout_losses(last.output_dir) == losses
    torch.testing.assert_close(weights(kept.output_dir), weights(short.output_dir), rtol=0, atol=0)
    assert any(not torch.equal(one, weights(last.output_dir)[name]) for name, one in weights(kept.output_dir).items())
    assert not (kept.output_dir / "memguard/best").exists()


def test_it_stops_early_and_goes_on_when_told_to(run, wide_images, caplog, capsys):
    settings = {**ONE, **SPOILED, "validation_data_dir": str(wide_images), "checkpointing_steps": 5}
    settings |= {"load_best_model_at_end": True}
    caplog.set_level("INFO")
    whole = run("whole", **settings)
    best = int(np.argmin(heldout_losses(whole.output_dir)))
    stopped = run("run", **settings, early_stopping_patience=2)
    assert stopped.summary["stopped_early"]
    assert stopped.global_step == (best + 3) * ROUND < whole.global_step
    assert heldout_losses(stopped.output_dir) == heldout_losses(whole.output_dir)[: best + 3]
    assert results(stopped.output_dir)[0] == results(whole.output_dir)[0]

    assert not inspect([str(stopped.output_dir)])
    shown = capsys.readouterr().out
    assert "How it ended" in shown
    assert "the model that is kept" in shown

    again = run("run", **settings, early_stopping_patience=2, resume_from_checkpoint="latest")
    assert "nothing is left to do" in caplog.text
    assert again.global_step == stopped.global_step
    longer = run("run", **settings, early_stopping_patience=9, resume_from_checkpoint="latest")
    assert not longer.summary["stopped_early"]
    assert results(longer.output_dir) == results(whole.output_dir)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_resumed_run_keeps_what_one_that_was_not_stopped_keeps(run, wide_images, monkeypatch, shards):
    settings = {**ONE, **SPOILED, "validation_data_dir": str(wide_images), "load_best_model_at_end": True}
    settings |= {"num_shards": shards, "max_train_steps": 12 * shards, "lr_step_rules": f"1:{6 * shards},100"}
    whole = run("whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 9 * shards)  # the best round is over, and the next ones are not better
        with pytest.raises(Interrupted):
            run("parts", **settings)
    folder = whole.output_dir.parent / "parts"
    (checkpoint,) = list_checkpoints(folder)
    held = Path("memguard/best/unet/diffusion_pytorch_model.safetensors")
    assert (checkpoint / held).samefile(folder / held)  # a hard link, no second copy
    parts = run("parts", **settings, resume_from_checkpoint="latest")
    assert results(parts.output_dir) == results(whole.output_dir)
    elsewhere = run("elsewhere", **settings, resume_from_checkpoint=str(checkpoint))
    assert results(elsewhere.output_dir) == results(whole.output_dir)


ANCHORED = {"sample_rule": "anchored", "anchor_fraction": 0.5, "group_duplicates": "balance"}


def test_without_a_folder_the_images_held_back_are_measured(run, configure):
    settings = {**ONE, **SPOILED, **ANCHORED, "load_best_model_at_end": True}
    plan = make_plan(configure("plan", **settings))
    held_back = set(held_back_ids(plan.guard, plan.samples).tolist())
    measured = run("run", **settings)
    losses = heldout_losses(measured.output_dir)
    assert measured.summary["kept_step"] == (int(np.argmin(losses)) + 1) * ROUND
    table = pq.read_table(measured.output_dir / "memguard/samples.parquet").to_pydict()
    clean = [seen > held for seen, held in zip(table["seen"], table["held_back"], strict=True)]
    trained = {sample_id for sample_id, one in zip(table["sample_id"], clean, strict=True) if one}
    assert len(held_back) >= 8
    assert not trained & held_back
    card = str(model_card("me/mine", plan.config, plan.guard, measured.summary))
    assert f"that of step {measured.summary['kept_step']}" in card


def test_what_cannot_be_compared_is_refused(run, configure):
    with pytest.raises(ConfigError, match=r"at least 8 that the sample rule holds back, got 0 \(rule `agc`\)"):
        run(**ONE, load_best_model_at_end=True)
    with pytest.raises(ConfigError, match="load_best_model_at_end"):
        configure(**ONE, early_stopping_patience=2)


def test_the_room_for_the_best_model_is_counted(configure, wide_images):
    settings = {**ONE, "validation_data_dir": str(wide_images)}
    without, kept = (make_plan(configure(**settings, load_best_model_at_end=on)).sizes for on in (False, True))
    assert kept.best == 2 * kept.model
    assert without.best == 0
