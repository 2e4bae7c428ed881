"""Runs of two processes against runs of one: the same result, the same state, and an end that leaves all whole."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from sd_memguard.config import ConfigError, TrainConfig
from sd_memguard.data.samples import SampleError, Samples
from sd_memguard.environment import SPREADING
from sd_memguard.runs.checkpoint import CheckpointError, list_checkpoints, verify_checkpoint
from sd_memguard.training.signals import Interrupted
from sd_memguard.training.trainer import Trainer, train
from tests.conftest import short_run, write_images

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
UNET = Path("unet/diffusion_pytorch_model.safetensors")
TOLERANCE = 2e-6
"""Of weights around 1 after some ten steps: float32 rounding of sums taken in another order."""
EPSILON = {"adam_epsilon": 1e-4}
"""AdamW's epsilon where sums are taken in another order: with 1e-8 it blows the rounding of tiny gradients up."""

TERM = int(signal.SIGTERM)

# Each process its own shards. Uneven ones: 22 steps over four shards are 6, 6, 5 and 5, in rounds of three.
SHARDS = {"num_shards": 4, "steps_per_round": 3, "max_train_steps": 22, "checkpointing_steps": 9, **EPSILON}
EMA = {"num_shards": 2, "max_train_steps": 8, "use_ema": True, "proxy_store": "disk", **EPSILON}
EMA |= {"gradient_accumulation_steps": 2}
LORA = {"num_shards": 2, "proxy": "lora", "rank": 2, "learning_rate": 1e-2}
LORA |= {"skip_threshold": 0.97, "steps_per_round": 3, "max_train_steps": 12}
# All processes one batch. A threshold this high leaves steps without a clean sample.
BATCH = {"num_shards": 3, "max_train_steps": 18, "proxy_store": "disk", "checkpointing_steps": 9, **EPSILON}
PLAIN = {"memguard": "off", "max_train_steps": 6, "gradient_accumulation_steps": 2, "cache_latents": "off", **EPSILON}
BUCKETS = {"enable_bucket": True, "bucket_reso_steps": 8, "num_shards": 2, "max_train_steps": 24, **EPSILON}
LOST = [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return the folder of all runs."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def configure(pipeline, images, home):
    return lambda name, **settings: short_run(pipeline, images, home / name, **settings)


def heldout_settings(folder: Path) -> dict:
    """Return the settings of a run that measures held-out images, keeps the best model, and trains class images."""
    settings = {"validation_data_dir": str(folder), "center_crop": True, "load_best_model_at_end": True}
    return {**settings, "with_prior_preservation": True, "class_data_dir": str(folder), "num_class_images": 1}


def job(config: TrainConfig, **happens) -> dict:
    """Return a job for the worker."""
    happens = {"name": Path(config.output_dir).name, **happens}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return {"settings": config.to_dict(), "port": free.getsockname()[1], **happens}


def launch(folder: Path, jobs: list[dict]) -> None:
    """Run the jobs in two processes."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.training.processes_worker", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    with (folder / "output.txt").open("w") as output:
        started = [
            subprocess.Popen([*command, rank, "2"], cwd=ROOT, env=environment, stderr=output) for rank in ("0", "1")
        ]
        try:
            for process in started:
                process.wait(timeout=1200)
        finally:
            for process in started:
                process.kill()


def stopped_run(config: TrainConfig, step: int) -> None:
    """Train in this process until a SIGTERM arrives."""
    take = Trainer.step

    def step_and_signal(trainer, *args):
        if trainer.progress.global_step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return take(trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step_and_signal)
        with pytest.raises(Interrupted):
            train(config)


@pytest.fixture(scope="module")
def shapes(home):
    """Return a folder of 24 images of several buckets."""
    return write_images(home / "shapes" / "images", [(64, 64), (50, 32), (32, 48), (90, 40), (40, 24), (64, 60)] * 4)


@pytest.fixture(scope="module")
def one(configure, wide_images, shapes):
    """Return the folders of the runs in one process, by name."""
    heldout = heldout_settings(wide_images)
    arms = {"shards": {**SHARDS, **heldout}, "ema": EMA, "lora": LORA, "batch": {**BATCH, **heldout}}
    buckets = {**BUCKETS, "train_data_dir": str(shapes)}
    arms |= {"buckets": buckets, "sliced-buckets": {**buckets, "num_shards": 3}}
    return {name: train(configure(f"one-{name}", **settings)).output_dir for name, settings in arms.items()}


@pytest.fixture(scope="module")
def two(configure, home, wide_images, shapes, one):
    """Return the folders of the runs in two processes, by name."""
    heldout = heldout_settings(wide_images)
    shards = {**SHARDS, **heldout}
    stopped_run(configure("one-then-two", **shards), 17)
    half = {"train_batch_size": 2}  # in each of two processes
    again = {"resume_from_checkpoint": "latest"}
    buckets = {**BUCKETS, "train_data_dir": str(shapes)}
    jobs = [
        job(configure("two-shards", **shards)),
        job(configure("two-stopped", **shards), signals={"1": [4, TERM]}, copy=str(home / "two-then-one"), name="stop"),
        job(configure("two-stopped", **shards, **again)),
        job(configure("one-then-two", **shards, **again)),
        job(configure("two-ema", **EMA, cache_latents="disk", encoding_cache_dir=str(home / "cache"))),
        job(configure("two-lora", **LORA)),
        job(configure("two-batch", **BATCH, **heldout, **half)),
        job(
            configure("batch-stopped", **BATCH, **heldout, **half),
            signals={"1": [7, TERM]},
            copy=str(home / "batch-then-one"),
            name="batch-stop",
        ),
        job(configure("batch-stopped", **BATCH, **heldout, **half, **again)),
        job(configure("two-plain", **PLAIN, **half), loses=LOST),
        job(configure("two-buckets", **buckets)),
        job(configure("two-sliced-buckets", **{**buckets, "num_shards": 3}, **half)),
        job(configure("refused", **BATCH, **half, resume_from_checkpoint="checkpoint-1")),
        job(configure("refused-elsewhere", pretrained_model_name_or_path=str(home / "nothing"))),
        # The last one: it takes its process with it.
        job(configure("killed", **{**SHARDS, "checkpointing_steps": 2}), signals={"1": [4, int(signal.SIGKILL)]}),
    ]
    launch(home, jobs)
    return {path.name.removeprefix("two-"): path for path in home.iterdir() if path.is_dir()}


def outcomes(folder: Path) -> list[dict]:
    """Return how the job of this name, beside the folder of its run, ended in each process."""
    return [json.loads((folder.parent / f"{folder.name}-outcome-{rank}.json").read_text()) for rank in range(2)]


def rounds(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "memguard/rounds.jsonl").read_text().splitlines()]


def assert_same_values(first, second, tolerance=1e-4):
    """Compare JSON values: numbers to rounding, all else exactly."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same_values(first[name], second[name], tolerance)
    elif isinstance(first, list):
        assert len(first) == len(second)
        for left, right in zip(first, second, strict=True):
            assert_same_values(left, right, tolerance)
    elif isinstance(first, float):
        assert first == pytest.approx(second, rel=tolerance, abs=1e-6)
    else:
        assert first == second


def assert_same_run(first: Path, second: Path) -> None:
    """Compare the weights, the rounds, the ledger and the banks of two runs."""
    torch.testing.assert_close(load_file(first / UNET), load_file(second / UNET), rtol=0, atol=TOLERANCE)
    assert_same_values(rounds(first), rounds(second))
    tables = [pq.read_table(folder / "memguard/samples.parquet") for folder in (first, second)]
    assert tables[0].equals(tables[1])
    banks = [load_file(folder / "memguard/banks.safetensors") for folder in (first, second)]
    torch.testing.assert_close(*banks, rtol=1e-4, atol=1e-6, equal_nan=True)


def bytes_of(folder: Path) -> list[bytes]:
    files = ("rounds.jsonl", "samples.parquet", "banks.safetensors", "summary.json")
    return [(folder / file).read_bytes() for file in (UNET, *(Path("memguard", name) for name in files))]


# Each process its own shards.


@pytest.mark.parametrize("arm", ["shards", "ema", "lora"])
def test_shards_side_by_side_give_what_one_process_gives(one, two, arm):
    assert_same_run(one[arm], two[arm])
    history = rounds(two[arm])
    assert sum(row["extra_steps"] for row in history) > 0
    assert {row["kind"] for row in history} == {"redistribute", "average"}
    assert sum(move["count"] for row in history for move in row["moves"]) > 0
    assert all(shard["distance"] > 0 for row in history for shard in row["shards"])


@pytest.mark.parametrize("arm", ["buckets", "sliced-buckets"])
def test_images_of_several_sizes_give_what_one_process_gives(one, two, arm):
    assert_same_run(one[arm], two[arm])
    assert sum(row["extra_steps"] for row in rounds(two[arm])) > 0


def test_caches_on_disk_are_filled_by_all_and_found_by_all(two, home):
    (latents,) = (home / "cache").glob("latents-*")
    sizes = [len(load_file(file)["keys"]) for file in latents.glob("*.safetensors")]
    assert sizes == [12, 12]


def test_nothing_is_sent_within_a_round(two):
    first, second = outcomes(two["shards"])
    assert (first["steps"], second["steps"]) == (11, 11)
    assert "batch" not in first["sent"]
    num_weights = sum(tensor.numel() for tensor in load_file(two["shards"] / UNET).values())
    round_ends, looks, best_models, checkpoints, last = 2, 2, 2, 3, 1
    expected = 8 * num_weights * (round_ends + looks + best_models + checkpoints + last)
    assert first["sent"]["mean of weights"] == second["sent"]["mean of weights"] == expected
    others = sum(first["sent"].values()) - expected
    assert others < 100_000


def test_no_noise_is_drawn_twice(one, two):
    for arm in ("shards", "batch", "plain"):
        drawn = [outcome["noise"] for outcome in outcomes(two[arm])]
        assert all(drawn)
        together = drawn[0] + drawn[1]
        assert len(set(together)) == len(together)


def test_checkpoints_come_in_time_and_whole(two):
    steps = [int(folder.name.removeprefix("checkpoint-")) for folder in list_checkpoints(two["shards"])]
    # The shares of 9 and 18 steps are 4.5 and 9 of each process; the last is written before the export.
    assert steps == [10, 18, 22]
    for folder in list_checkpoints(two["shards"]):
        verify_checkpoint(folder)
        proxies = sorted(path.name for path in (folder / "memguard/proxies").iterdir())
        assert any(name.startswith("process-0-") for name in proxies)
        assert any(name.startswith("process-1-") for name in proxies)
    assert not list(two["shards"].glob("writing-*"))


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on_to_the_same_bytes(two):
    assert [outcome["exit"] for outcome in outcomes(two["stopped"].with_name("stop"))] == [143, 143]
    assert bytes_of(two["stopped"]) == bytes_of(two["shards"])


def test_another_number_of_processes_goes_on(one, two, configure, wide_images):
    assert_same_run(one["shards"], two["one-then-two"])
    heldout = heldout_settings(wide_images)
    resumed = train(configure("two-then-one", **SHARDS, **heldout, resume_from_checkpoint="latest"))
    assert_same_run(one["shards"], resumed.output_dir)


# All processes one batch.


def test_a_batch_in_slices_gives_what_one_process_gives(one, two):
    assert_same_run(one["batch"], two["batch"])
    summary = json.loads((two["batch"] / "memguard/summary.json").read_text())
    assert summary["empty_steps"] > 0
    assert summary["extra_steps"] > 0
    assert all("batch" in outcome["sent"] for outcome in outcomes(two["batch"]))


def test_a_batch_in_slices_stops_together_and_goes_on_to_the_same_bytes(two):
    stopped = two["batch-stopped"]
    assert [outcome["exit"] for outcome in outcomes(stopped.with_name("batch-stop"))] == [143, 143]
    assert (two["batch-then-one"] / "checkpoint-7").is_dir()
    assert bytes_of(stopped) == bytes_of(two["batch"])


def test_a_batch_in_slices_goes_on_in_one_process_of_as_many_samples(one, two, configure, wide_images):
    settings = {**BATCH, **heldout_settings(wide_images), "resume_from_checkpoint": "latest"}
    with pytest.raises(CheckpointError, match="train_batch_size"):
        train(configure("batch-then-one", **settings, train_batch_size=2))
    resumed = train(configure("batch-then-one", **settings))
    assert_same_run(one["batch"], resumed.output_dir)


def test_plain_training_with_lost_images_gives_what_one_process_gives(two, configure, monkeypatch):
    take, read, begun = Trainer.step, Samples.keyed_image, []

    def image(samples, sample_id):
        if begun and sample_id in LOST:
            raise SampleError("gone")
        return read(samples, sample_id)

    monkeypatch.setattr(Samples, "keyed_image", image)
    monkeypatch.setattr(Trainer, "step", lambda *args: begun.append(1) or take(*args))
    alone = train(configure("one-plain", **PLAIN))
    assert_same_run(alone.output_dir, two["plain"])
    summary = json.loads((two["plain"] / "memguard/summary.json").read_text())
    assert summary["unreadable_samples"] == alone.summary["unreadable_samples"] > 0
    assert summary["image_forwards"] == alone.summary["image_forwards"]


# What ends a run.


def test_an_error_of_the_user_ends_all_and_is_said_once(two, home):
    first, second = outcomes(home / "refused-elsewhere")
    assert "nothing" in first["error"]
    assert second["exit"] == 2
    first, second = outcomes(home / "refused")
    assert "checkpoint-1" in first["error"]
    assert second["exit"] == 2


def test_a_killed_process_ends_the_other_and_leaves_a_whole_checkpoint(two, home):
    assert "cannot reach the others" in json.loads((home / "killed-outcome-0.json").read_text())["error"]
    assert not (home / "killed-outcome-1.json").exists()
    verify_checkpoint(list_checkpoints(two["killed"])[-1])


def test_a_sigterm_to_the_launcher_saves_once_and_ends_all(home, pipeline, images):
    flags = {"pretrained": pipeline, "train_data_dir": images, "resolution": 32, "max_train_steps": 100000}
    flags |= {"train_batch_size": 4, "checkpointing_steps": 10, "checkpoints_total_limit": 1, "num_shards": 2}
    arguments = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "sd_memguard.train", *arguments, "--output_dir", str(home / "terminated")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    with (home / "terminated.txt").open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
    deadline = time.monotonic() + 600
    while not list_checkpoints(home / "terminated") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    assert process.wait(timeout=120) == 1
    output = (home / "terminated.txt").read_text()
    (kept,) = list_checkpoints(home / "terminated")
    verify_checkpoint(kept)
    assert output.count(f"SIGTERM: saved step {kept.name.removeprefix('checkpoint-')};") == 1
    assert output.count("SIGTERM: saved step") == 1


# What is refused.


@pytest.mark.parametrize("plugin", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_spreads_one_model_is_refused_by_name(configure, monkeypatch, plugin):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(ConfigError, match=SPREADING[plugin]):
        train(configure("spread"))


def test_processes_that_do_not_know_of_each_other_are_refused(configure, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes .* has joined 1.*ACCELERATE_USE_CPU"):
        train(configure("apart"))
