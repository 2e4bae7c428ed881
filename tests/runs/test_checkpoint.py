"""Which checkpoints are kept, which one is gone on from, and which are nobody's business."""

import json
from pathlib import Path

import pytest

from sd_memguard.runs.checkpoint import (
    CheckpointError,
    find_checkpoint,
    foreign_checkpoints,
    list_checkpoints,
    prune_checkpoints,
    remove_leftovers,
    save_checkpoint,
)
from sd_memguard.runs.folder import RunFolderError
from sd_memguard.training.plan import make_plan


def write(folder: Path) -> None:
    (folder / "memguard").mkdir()
    (folder / "memguard/state.json").write_text("{}")


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


def test_a_run_that_went_back_keeps_its_own_checkpoints(tmp_path):
    for step in (500, 14_000):  # and at 14,000 the loss is not finite any more
        save_checkpoint(tmp_path, step, write)
    for step in (1000, 1500):  # gone on from 500
        save_checkpoint(tmp_path, step, write)
        prune_checkpoints(tmp_path, 2)
    assert names(list_checkpoints(tmp_path)) == ["checkpoint-1000", "checkpoint-1500"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1500"


def test_the_order_of_writing_outlives_copies_and_replacements(tmp_path):
    for step in (9, 10, 9):
        save_checkpoint(tmp_path, step, write)
    assert names(list_checkpoints(tmp_path)) == ["checkpoint-10", "checkpoint-9"]
    (tmp_path / "checkpoint-9/manifest.json").unlink()  # damaged: the last to be gone on from, but seen
    assert names(list_checkpoints(tmp_path)) == ["checkpoint-9", "checkpoint-10"]


@pytest.fixture
def diffusers_checkpoint(tmp_path):
    """Return a checkpoint as `accelerator.save_state` writes it, with the part of a guard in it."""
    folder = tmp_path / "run/checkpoint-500"
    write_accelerate_state(folder)
    return folder


def write_accelerate_state(folder: Path) -> None:
    (folder / "memguard").mkdir(parents=True)
    for name in ("memguard/state.json", "optimizer.bin", "random_states_0.pkl", "model.safetensors"):
        (folder / name).write_text("{}")


@pytest.mark.parametrize("resumed", [None, "latest"])
def test_checkpoints_of_others_are_refused_before_anything_is_done(configure, diffusers_checkpoint, resumed):
    with pytest.raises(RunFolderError, match="checkpoint-500, which another program"):
        make_plan(configure(resume_from_checkpoint=resumed))


def test_checkpoints_of_others_are_neither_replaced_nor_pruned(diffusers_checkpoint):
    folder = diffusers_checkpoint.parent
    save_checkpoint(folder, 600, write)
    prune_checkpoints(folder, 1)
    with pytest.raises(CheckpointError, match="was not written by sd-memguard"):
        save_checkpoint(folder, 500, write)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-500", "checkpoint-600"]
    assert json.loads((diffusers_checkpoint / "optimizer.bin").read_text()) == {}


def test_a_checkpoint_whose_removal_is_cut_short_does_not_pass_for_another_programs(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, write)
    with monkeypatch.context() as patch:
        patch.setattr("sd_memguard.runs.checkpoint.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, 1)
    assert foreign_checkpoints(tmp_path) == []
    assert names(list_checkpoints(tmp_path)) == ["checkpoint-2"]
    remove_leftovers(tmp_path)
    assert names(list(tmp_path.iterdir())) == ["checkpoint-2"]


def killed(folder, *_, **__):
    """Remove what says whose checkpoint it is, and get no further."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.unlink()
    raise KeyboardInterrupt
