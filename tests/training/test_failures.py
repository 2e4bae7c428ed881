"""What goes wrong in the middle of a run: it is named, and what was saved before is whole."""

import csv
import errno
import logging
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sd_memguard.data.samples import BadSample, SampleError, Samples
from sd_memguard.export import exporter
from sd_memguard.export.target import ExportError
from sd_memguard.proxies import state_file
from sd_memguard.runs.checkpoint import list_checkpoints, verify_checkpoint
from sd_memguard.training import trainer
from sd_memguard.training.failures import (
    DiskFullError,
    NonFiniteError,
    OutOfMemoryError,
    explained_faults,
    memory_advice,
)
from sd_memguard.training.plan import write_bad_samples
from sd_memguard.training.trainer import Trainer

UNET = Path("unet/diffusion_pytorch_model.safetensors")
SHORT = {"max_train_steps": 6, "checkpointing_steps": 3}


def fail_at(monkeypatch, owner, name: str, number: int, error: BaseException) -> None:
    """Let the call of that number, counted from 1, raise."""
    original, calls = getattr(owner, name), []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == number:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(owner, name, failing)


# Memory.


def test_exhausted_memory_names_settings_that_help_and_keeps_the_checkpoint(run, configure, monkeypatch):
    fail_at(monkeypatch, Trainer, "step", 5, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(OutOfMemoryError, match=r"--train_batch_size 2.*--gradient_checkpointing.*--proxy lora"):
        run(**SHORT)
    (kept,) = list_checkpoints(Path(configure().output_dir))
    verify_checkpoint(kept)


def test_advice_does_not_name_what_is_in_use(configure):
    advice = memory_advice(configure(train_batch_size=1, gradient_checkpointing=True, mixed_precision="bf16"))
    assert not any(used in advice for used in ("--train_batch_size", "--gradient_checkpointing", "--mixed_precision"))
    assert "--resolution" in advice


# Disk.

FULL = [
    pytest.param(OSError(errno.ENOSPC, "No space left on device"), id="full"),
    pytest.param(OSError(errno.EDQUOT, "Disk quota exceeded"), id="quota"),
    pytest.param(SafetensorError("I/O error: No space left on device (os error 28)"), id="safetensors"),
]


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_in_a_save_leaves_the_older_checkpoint_and_a_run_that_goes_on(run, configure, monkeypatch, error):
    whole = (run("whole", **SHORT).output_dir / UNET).read_bytes()
    folder = Path(configure("full").output_dir)
    with monkeypatch.context() as patch:
        fail_at(patch, state_file, "save_file", 2, error)
        with pytest.raises(DiskFullError, match="--resume_from_checkpoint latest"):
            run("full", **SHORT)
    assert [path.name for path in folder.glob("*checkpoint-*")] == ["checkpoint-3"]
    verify_checkpoint(folder / "checkpoint-3")
    assert not (folder / "model_index.json").exists()
    run("full", **SHORT, resume_from_checkpoint="latest")
    assert (folder / UNET).read_bytes() == whole


def test_a_disk_that_is_full_at_the_end_costs_no_step(run, configure, monkeypatch):
    whole = (run("whole", **SHORT).output_dir / UNET).read_bytes()
    settings = {**SHORT, "checkpointing_steps": 4}
    with monkeypatch.context() as patch:
        fail_at(patch, trainer, "write_pipeline", 1, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(DiskFullError, match="--resume_from_checkpoint latest"):
            run("full", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", None)  # none is left to take
        folder = run("full", **settings, resume_from_checkpoint="latest").output_dir
    assert (folder / UNET).read_bytes() == whole


def test_an_export_that_fails_in_whatever_way_leaves_a_finished_run(run, configure, monkeypatch):
    def fail(exporter, format, *args, **options):
        raise RuntimeError("an error of some library")

    monkeypatch.setattr(exporter.Exporter, "export", fail)
    with pytest.raises(ExportError, match="`single-file`: RuntimeError: an error of some library"):
        run(**SHORT, export_formats=("single-file",))
    folder = Path(configure().output_dir)
    assert (folder / "model_index.json").is_file()
    assert (folder / "memguard/summary.json").is_file()


def test_other_errors_pass_unchanged(configure):
    with pytest.raises(PermissionError), explained_faults(configure()):
        raise PermissionError(errno.EACCES, "denied")
    with pytest.raises(SafetensorError), explained_faults(configure()):
        raise SafetensorError("header too large")


def test_what_a_killed_save_left_is_removed(run, configure):
    folder = Path(configure().output_dir)
    left = folder / "writing-checkpoint-3"
    left.mkdir(parents=True)
    (left / "part.safetensors").write_bytes(b"half")
    (folder / "writing-a-diary.txt").write_text("mine")
    run(**SHORT)
    assert not left.exists()
    assert (folder / "writing-a-diary.txt").exists()


# Numbers.


def test_weights_that_are_not_finite_are_never_saved(run, configure, monkeypatch):
    take = Trainer.step

    def poisoned(trainer, *args):
        verdicts = take(trainer, *args)
        if trainer.progress.global_step == 4:
            with torch.no_grad():
                trainer.parameters[3].view(-1)[0] = torch.inf
        return verdicts

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(NonFiniteError):
        run(**SHORT, memguard="off")
    folder = Path(configure().output_dir)
    assert [path.name for path in folder.glob("*checkpoint-*")] == ["checkpoint-3"]
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "checkpoint-3" / UNET).values())
    assert not (folder / "model_index.json").exists()


# Images.


@pytest.fixture
def own_images(images, tmp_path):
    """A folder of images that a test may spoil."""
    return Path(shutil.copytree(images, tmp_path / "own"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_image_that_goes_bad_is_named_once_and_left_out(run, own_images, monkeypatch, caplog, workers):
    whole = Samples.keyed_image
    lost = "secret-05.png"

    def image(samples, sample_id):
        if samples.file(sample_id) == lost:
            (own_images / lost).unlink(missing_ok=True)
        return whole(samples, sample_id)

    monkeypatch.setattr(Samples, "keyed_image", image)
    with caplog.at_level(logging.WARNING, "sd_memguard"):
        result = run(
            train_data_dir=str(own_images), cache_latents="off", dataloader_num_workers=workers, max_train_steps=12
        )
    assert caplog.text.count("goes on without it") == 1
    assert lost in caplog.text
    rows = pq.read_table(result.output_dir / "memguard/samples.parquet").to_pylist()
    seen = {row["file"]: row["seen"] for row in rows}
    assert seen[lost] == 0
    assert result.summary["unreadable_samples"] > 0
    assert sum(seen.values()) + result.summary["unreadable_samples"] == 12 * 4
    assert all(tensor.isfinite().all() for tensor in load_file(result.output_dir / UNET).values())


def test_a_run_whose_images_all_go_bad_takes_no_step(run, own_images, pipeline, monkeypatch):
    whole = Samples.keyed_image

    def image(samples, sample_id):
        (own_images / samples.file(sample_id)).unlink(missing_ok=True)
        return whole(samples, sample_id)

    monkeypatch.setattr(Samples, "keyed_image", image)
    result = run(train_data_dir=str(own_images), cache_latents="off", max_train_steps=6)
    before = load_file(pipeline / UNET)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(result.output_dir / UNET).items())
    assert result.summary["empty_steps"] == 6


# Bad samples.


@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_all_bad_samples_are_listed_in_a_file(run, configure, own_images, caplog, on_bad_sample):
    spoiled = [f"secret-{number:02}.png" for number in range(0, 24) if number % 8]
    for name in spoiled:
        (own_images / name).write_bytes(b"no image, at all")
    settings = {"train_data_dir": str(own_images), "on_bad_sample": on_bad_sample, "max_train_steps": 3}
    if on_bad_sample == "error":
        with pytest.raises(SampleError, match=r"bad_samples\.csv"):
            run(**settings)
    else:
        run(**settings)
        assert "bad_samples.csv" in caplog.text
    with (Path(configure().output_dir) / "memguard/bad_samples.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == spoiled
    assert [int(row["sample_id"]) for row in rows] == [number for number in range(24) if number % 8]
    assert all("image" in row["reason"] for row in rows)


def test_no_cell_of_the_list_of_bad_samples_is_a_formula(tmp_path):
    bad = [BadSample(3, "=HYPERLINK(evil).png", "@reason"), BadSample(4, "plain.png", "caption is empty")]
    with write_bad_samples(tmp_path, bad).open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert rows == [["3", "'=HYPERLINK(evil).png", "'@reason"], ["4", "plain.png", "caption is empty"]]
