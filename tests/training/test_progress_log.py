"""The curves in the tracker against the files of the run."""

import json

import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sd_memguard.training.trainer import Trainer, train

STEP_CURVES = {"train_loss", "lr", "skipped_fraction", "augmented_fraction"}


@pytest.fixture(scope="module")
def curves(finished_run):
    """Return each curve as a dict from step to value."""
    (events,) = (finished_run.output_dir / "logs").glob("*/events*")  # the settings lie in folders below
    reader = EventAccumulator(str(events), {"scalars": 0})
    reader.Reload()
    return {tag: {one.step: one.value for one in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


def expected_curves(row: dict) -> dict:
    values = {name: row[name] for name in ("extra_steps", "empty_steps", "nonfinite_steps", "image_forwards")}
    values |= {"heldout_loss": row["heldout_loss"], "probe_train_loss": row["train_loss"]}
    values |= {"loss_gap": row["heldout_loss"] - row["train_loss"], "relative_gap": row["relative_gap"]}
    values |= {"moved_samples": sum(move["count"] for move in row["moves"])}
    for shard in row["shards"]:
        values |= {f"shard_{shard['shard']}/{name}": value for name, value in shard.items() if name != "shard"}
    return {name: value for name, value in values.items() if value is not None}


def test_every_number_of_a_round_is_a_curve(finished_run, curves):
    rows = [json.loads(line) for line in (finished_run.output_dir / "memguard/rounds.jsonl").read_text().splitlines()]
    named = set()
    for row in rows:
        for name, value in expected_curves(row).items():
            assert curves[name][row["global_step"]] == pytest.approx(value, rel=1e-6), name
            named.add(name)
    assert set(curves) == named | STEP_CURVES


def test_every_step_is_on_the_curves_of_steps(finished_run, curves):
    for name in STEP_CURVES:
        assert list(curves[name]) == list(range(1, 25))
    share = sum(curves["skipped_fraction"].values()) / 24
    assert share == pytest.approx(finished_run.summary["skipped_fraction"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "is_warned"),
    [
        pytest.param({}, True, id="long"),
        pytest.param({"max_train_steps": 2}, False, id="short"),
        pytest.param({"memguard": "off"}, False, id="unguarded"),
        pytest.param({"num_shards": 2, "max_train_steps": 6}, False, id="shards"),
    ],
)
def test_a_run_that_sees_its_images_often_says_what_stops_before(run, caplog, monkeypatch, settings, is_warned):
    monkeypatch.setattr("sd_memguard.training.progress_log.MANY_TIMES_SEEN", 1)
    settings = {"num_shards": 1, "train_batch_size": 8, "max_train_steps": 4, "augment_threshold": 0.0} | settings
    done = run("run", **settings)
    num_images = pq.read_table(done.output_dir / "memguard/samples.parquet").num_rows
    seen = f"each image is seen {done.global_step * 8 / num_images:.0f} times"
    assert (seen in caplog.text) == ("each image is seen" in caplog.text) == is_warned


def all_curves(folder) -> dict:
    """Return every curve of a run whose events lie in one or more files, as its tracker would show them."""
    reader = EventAccumulator(str(next((folder / "logs").iterdir())), {"scalars": 0})
    reader.Reload()
    return {tag: [(one.step, one.value) for one in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_a_resumed_run_goes_on_with_its_curves(run, configure, monkeypatch):
    settings = {"checkpointing_steps": 4, "max_train_steps": 12}
    whole = all_curves(run("whole", **settings).output_dir)
    step = Trainer.step

    def cut(trainer, *arguments):
        if trainer.progress.global_step == 10:  # two steps after the checkpoint it goes on from
            raise RuntimeError("power cut")
        return step(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run("cut", **settings)
    folder = run("cut", **settings, resume_from_checkpoint="latest").output_dir
    assert all_curves(folder) == whole


def test_a_resumed_run_is_the_same_run_for_trackers_with_a_server(configure, monkeypatch):
    told = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config, init_kwargs: told.append(init_kwargs))
    settings = {"checkpointing_steps": 4, "max_train_steps": 8}
    train(configure("run", **settings))
    train(configure("run", **(settings | {"max_train_steps": 12}), resume_from_checkpoint="latest"))
    train(configure("other", **settings))
    first, second, other = ((kwargs["wandb"]["id"], kwargs["comet_ml"]["experiment_key"]) for kwargs in told)
    assert first == second != other
    assert told[0]["wandb"]["resume"] == "allow"
