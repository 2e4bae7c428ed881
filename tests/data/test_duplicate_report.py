"""Whole runs on a set with repeated images."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from sd_memguard.config import ConfigError
from sd_memguard.runs.checkpoint import CheckpointError
from sd_memguard.training.plan import make_plan
from sd_memguard.training.signals import Interrupted
from tests.training.test_trainer import results, stop_at

COPIES = 9


@pytest.fixture(scope="module")
def repeated(images, tmp_path_factory):
    """Return the 24 images and, before and after them, nine more copies of number 3."""
    folder = tmp_path_factory.mktemp("repeated") / "images"
    shutil.copytree(images, folder)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    for number in range(COPIES):
        shutil.copyfile(folder / "secret-03.png", folder / f"copy-{number}.png")
        line = json.dumps({"file_name": f"copy-{number}.png", "text": f"copy {number}"})
        lines.insert(0 if number % 2 else len(lines), line)
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def table(folder):
    return pq.read_table(folder / "memguard/samples.parquet").to_pydict()


def is_repeated(file):
    return file.startswith("copy") or file == "secret-03.png"


@pytest.mark.parametrize("step", [6, 9])
def test_a_resumed_balanced_run_equals_one_that_was_not_stopped(run, repeated, monkeypatch, step):
    settings = {"train_data_dir": str(repeated), "group_duplicates": "balance", "checkpointing_steps": 100}
    whole = run("whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            run("parts", **settings)
    parts = run("parts", **settings, resume_from_checkpoint="latest")
    assert results(parts.output_dir) == results(whole.output_dir)
    assert whole.summary["moved_samples"] > 0


def test_copies_share_a_shard_and_balanced_count_as_one(run, repeated, caplog):
    seen = {}
    for mode in ("shard", "balance"):
        with caplog.at_level("INFO"):
            columns = table(run(mode, train_data_dir=str(repeated), group_duplicates=mode).output_dir)
        repeats = [row for row, file in enumerate(columns["file"]) if is_repeated(file)]
        assert len(repeats) == COPIES + 1
        assert len({columns["shard"][row] for row in repeats}) == 1
        groups = columns["duplicate_group"]
        assert {groups[row] for row in repeats} == {columns["sample_id"][repeats[0]]}
        assert [group is None for group in groups] == [not is_repeated(file) for file in columns["file"]]
        seen[mode] = sum(columns["seen"][row] for row in repeats)
        assert "1 group of near-identical images holds 10 samples of 33" in caplog.text
    # 24 steps of 4 images are about three passes over the samples, or four over the groups.
    assert seen["shard"] > 20
    assert 1 <= seen["balance"] <= 6


def test_without_duplicates_the_three_modes_are_one(run):
    finished = [run(mode, group_duplicates=mode).output_dir for mode in ("off", "shard", "balance")]
    assert results(finished[0]) == results(finished[1]) == results(finished[2])
    assert table(finished[0])["duplicate_group"] == [None] * 24


def test_another_mode_is_refused_on_resuming(run, repeated):
    settings = {"train_data_dir": str(repeated), "max_train_steps": 6, "checkpointing_steps": 3}
    run(**settings, group_duplicates="shard")
    with pytest.raises(CheckpointError, match="`--group_duplicates` shard there, balance here"):
        run(**settings, group_duplicates="balance", resume_from_checkpoint="latest")


def test_the_plan_counts_images_as_the_mode_says(configure, repeated, capsys, run):
    settings = {"train_data_dir": str(repeated), "max_train_steps": None, "num_train_epochs": 4, "num_shards": 2}
    steps = {}
    for mode in ("off", "shard", "balance"):
        plan = make_plan(configure(group_duplicates=mode, **settings))
        steps[mode] = (plan.epoch_length, plan.schedule.total_steps)
    assert steps == {"off": (33, 4 * 9), "shard": (33, 4 * 9), "balance": (24, 4 * 6)}
    with pytest.raises(ConfigError, match=r"near-duplicates counted once \(24\), got 25"):
        make_plan(configure(**{**settings, "num_shards": 25}))
    make_plan(configure(**{**settings, "num_shards": 25}, group_duplicates="off"))
    run(**settings, dry_run=True)
    assert "1 group of near-identical images holds 10 samples, each in one shard" in capsys.readouterr().out


def test_the_guard_is_off_without_looking_for_duplicates(configure, repeated):
    plan = make_plan(configure(memguard="off", train_data_dir=str(repeated)))
    assert plan.samples.groups is None
    assert plan.epoch_length == 33
