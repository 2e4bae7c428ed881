"""Whole runs: resumed ones, repeated ones, neutral ones, and those that go wrong."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sd_memguard.config import ConfigError, GuardConfig
from sd_memguard.export.hub import ALLOWED, model_card
from sd_memguard.models.pipeline import ModelError
from sd_memguard.runs.checkpoint import CheckpointError, list_checkpoints
from sd_memguard.runs.folder import RunFolderError
from sd_memguard.training.build import make_accelerator
from sd_memguard.training.failures import NonFiniteError
from sd_memguard.training.loss import DenoisingLoss
from sd_memguard.training.plan import make_plan
from sd_memguard.training.signals import Interrupted, StopRequest
from sd_memguard.training.trainer import Trainer
from tests.reference.bare_loop import bare_loop

UNET = Path("unet/diffusion_pytorch_model.safetensors")
RECORDS = ("rounds.jsonl", "samples.parquet", "banks.safetensors", "summary.json")
RESULTS = [UNET, *(Path("memguard", name) for name in RECORDS)]
EPSILON = 1e-4
"""AdamW's epsilon where sums are taken in another order: with 1e-8 it blows the rounding of tiny gradients up."""
NEUTRAL = {"num_shards": 1, "skip_threshold": 0.0, "augment_threshold": 0.0, "redistribute_fraction": 0.0}


def results(folder: Path) -> list[bytes]:
    return [(folder / file).read_bytes() for file in RESULTS]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / UNET)


def stop_at(monkeypatch, step: int) -> None:
    """Make the run that comes next receive a SIGTERM in this step."""
    take = Trainer.step

    def step_and_signal(trainer, *args):
        if trainer.progress.global_step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return take(trainer, *args)

    monkeypatch.setattr(Trainer, "step", step_and_signal)


# Three shards, rounds of two steps each: a round is six steps; the first moves samples, the second averages.
@pytest.mark.parametrize(
    ("step", "settings"),
    [
        pytest.param(9, {}, id="mid-shard"),
        pytest.param(8, {}, id="shard-end"),
        pytest.param(6, {}, id="before-redistribution"),
        pytest.param(7, {}, id="between-redistribution-and-averaging"),
        pytest.param(12, {}, id="before-averaging"),
        pytest.param(9, {"proxy_store": "disk"}, id="disk-store"),
        pytest.param(9, {"use_ema": True}, id="ema"),
        pytest.param(9, {"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param(9, {"caption_dropout": 0.3, "cache_latents": "off", "random_flip": True}, id="uncached"),
        pytest.param(
            9, {"shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "caption_separator": " "}, id="tags"
        ),
        pytest.param(9, {"random_affine": 0.05, "augment_threshold": 1.2}, id="affine"),
        pytest.param(9, {"num_shards": 1}, id="one-shard"),
        pytest.param(9, {"memguard": "off"}, id="plain"),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_stopped(run, configure, wide_images, monkeypatch, step, settings):
    if "random_flip" in settings:
        settings = {**settings, "train_data_dir": str(wide_images)}
    whole = run("whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted) as stopped:
            run("parts", **settings)
    assert stopped.value.code == 143
    folder = Path(configure("parts").output_dir)
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{step}"]
    parts = run("parts", **settings, resume_from_checkpoint="latest")
    assert results(parts.output_dir) == results(whole.output_dir)
    if settings.get("memguard") != "off":
        assert whole.summary["skipped_fraction"] > 0
        assert whole.summary["extra_steps"] > 0


def test_a_run_may_go_on_in_another_folder(run, configure, monkeypatch):
    whole = run("whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 15)
        with pytest.raises(Interrupted):
            run("first")
    checkpoint = Path(configure("first").output_dir, "checkpoint-15")
    second = run("second", resume_from_checkpoint=str(checkpoint))
    assert results(second.output_dir) == results(whole.output_dir)


def test_the_size_of_a_shard_is_that_of_the_round(run):
    rounds = Path(run(max_train_steps=12).output_dir, "memguard/rounds.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in rounds)
    assert [shard["size"] for shard in first["shards"]] == [8, 8, 8]
    sizes = [8, 8, 8]
    for move in first["moves"]:
        sizes[move["source"]] -= move["count"]
        sizes[move["target"]] += move["count"]
    assert [shard["size"] for shard in second["shards"]] == sizes


@pytest.mark.slow
def test_a_real_sigterm_ends_with_143_and_a_checkpoint(configure, images, pipeline, tmp_path):
    flags = {"pretrained": pipeline, "train_data_dir": images, "output_dir": tmp_path / "run", "resolution": 32}
    flags |= {"max_train_steps": 100000, "train_batch_size": 4, "checkpointing_steps": 10, "mixed_precision": "no"}
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "sd_memguard.train", *arguments]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list_checkpoints(tmp_path / "run") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors.decode()[-2000:]
    assert len(list_checkpoints(tmp_path / "run")) >= 1


def test_the_seed_decides_all_and_the_global_generators_nothing(run):
    before = torch.random.get_rng_state()
    first = run("first", max_train_steps=6)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    second, other = run("second", max_train_steps=6), run("other", max_train_steps=6, seed=8)
    assert results(first.output_dir) == results(second.output_dir)
    assert results(first.output_dir)[0] != results(other.output_dir)[0]


def test_a_neutral_guard_trains_like_none(run):
    guarded, plain = run("guarded", **NEUTRAL), run("plain", memguard="off")
    assert results(guarded.output_dir)[0] == results(plain.output_dir)[0]


def test_plain_training_equals_the_bare_loop(run, images, pipeline):
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    single = [row for row in rows if isinstance(row["text"], str)]
    folder = images.parent / "single"
    folder.mkdir()
    for row in single:
        (folder / row["file_name"]).write_bytes((images / row["file_name"]).read_bytes())
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in single))
    trained = run(memguard="off", train_data_dir=str(folder), max_train_steps=8, adam_epsilon=EPSILON)
    captioned = [(folder / row["file_name"], row["text"]) for row in single]
    expected = bare_loop(pipeline, captioned, 8, 4, 1e-3, EPSILON, seed=7)
    torch.testing.assert_close(weights(trained.output_dir), expected, rtol=0, atol=1e-6)


def test_accumulated_batches_equal_a_large_one(run):
    small = run("small", **NEUTRAL, adam_epsilon=EPSILON, gradient_accumulation_steps=2, max_train_steps=8)
    large = run("large", **NEUTRAL, adam_epsilon=EPSILON, train_batch_size=8, max_train_steps=8)
    torch.testing.assert_close(weights(small.output_dir), weights(large.output_dir), rtol=0, atol=1e-6)


# What a run leaves behind.


def test_a_run_folder(run, pipeline, images):
    run_folder, step, summary = run(
        validation_data_dir=str(images), validation_prompts=("a cat",), checkpointing_steps=8
    )
    assert step == 24
    StableDiffusionPipeline.from_pretrained(run_folder, local_files_only=True)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (pipeline / part).iterdir():
            assert (run_folder / part / file.name).read_bytes() == file.read_bytes()

    rounds = [json.loads(line) for line in (run_folder / "memguard/rounds.jsonl").read_text().splitlines()]
    assert [(row["round"], row["kind"]) for row in rounds] == [
        (1, "redistribute"),
        (2, "average"),
        (3, "redistribute"),
        (4, "average"),
    ]
    fields = {"shard", "size", "steps", "loss", "skipped_fraction", "augmented_fraction", "distance"}
    fields |= {"bank_mean", "bank_coverage"}
    assert all(set(shard) == fields for row in rounds for shard in row["shards"])
    assert sum(row["extra_steps"] for row in rounds) == summary["extra_steps"]
    assert all(row["train_loss"] == row["heldout_loss"] for row in rounds)  # the same images twice: same probe

    table = pq.read_table(run_folder / "memguard/samples.parquet")
    counts = ["seen", "skipped", "augmented", "moves", "skip_ratio"]
    assert table.column_names == ["sample_id", "file", "caption", "shard", "duplicate_group", *counts]
    columns = table.to_pydict()
    assert sum(columns["seen"]) == 24 * 4
    moved = sum(move["count"] for row in rounds for move in row["moves"])
    assert sum(columns["moves"]) == moved > 0

    events = EventAccumulator(str(next((run_folder / "logs").rglob("events*")).parent), {"images": 0})
    events.Reload()
    assert "validation" in events.Tags()["images"] or "validation/image/0" in events.Tags()["images"]


def test_the_hub_gets_the_pipeline_and_no_word_of_the_data(run, configure, images):
    result = run(checkpointing_steps=12, max_train_steps=12)
    files = [path.relative_to(result.output_dir).as_posix() for path in result.output_dir.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(files, allow_patterns=ALLOWED))
    assert UNET.as_posix() in sent
    assert "model_index.json" in sent
    assert any(name.startswith("checkpoint-") for name in files)
    assert not [name for name in sent if name.startswith(("checkpoint-", "memguard", "logs"))]
    config = configure(hub_token="hf_secret_token")
    card = str(model_card("me/mine", config, GuardConfig(sample_rule="agc"), result.summary))
    assert f"| samples skipped | {result.summary['skipped_fraction']:.1%} |" in card
    assert result.summary["memory_prone"]
    assert not [word for word in ("secret", "private thing", "another word", str(images)) if word in card]


def test_dry_run_prints_and_writes_nothing(run, capsys):
    result = run(dry_run=True)
    assert "optimizer steps: 24" in " ".join(capsys.readouterr().out.split())
    assert not result.output_dir.exists()


# What is refused.


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_shards": 25}, ConfigError, "num_shards"),
        ({"num_shards": 3, "max_train_steps": 2}, ConfigError, "max_train_steps"),
    ],
)
def test_impossible_settings_are_refused(run, settings, error, words):
    with pytest.raises(error, match=words):
        run(**settings)


def test_a_cache_that_would_not_be_exact_is_refused(run, wide_images):
    with pytest.raises(ConfigError, match="center_crop"):
        run(train_data_dir=str(wide_images), cache_latents="memory")


def test_the_folder_of_another_run_is_refused(run):
    run(max_train_steps=3)
    with pytest.raises(RunFolderError, match="another run"):
        run(max_train_steps=3)


@pytest.fixture
def broken(pipeline, tmp_path):
    """Return a function that copies the pipeline and changes one JSON file of it."""

    def change(file: str, **values) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(pipeline, folder)
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **values}))
        return folder

    return change


@pytest.mark.parametrize(
    "class_name", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusion3Pipeline", "StableDiffusionInpaintPipeline"]
)
def test_other_pipelines_are_refused_by_name(run, broken, class_name):
    folder = broken("model_index.json", _class_name=class_name)
    with pytest.raises(ModelError, match=class_name):
        run(pretrained_model_name_or_path=str(folder))


def test_an_inpainting_unet_is_refused(run, broken):
    with pytest.raises(ModelError, match="takes 9 channels"):
        run(pretrained_model_name_or_path=str(broken("unet/config.json", in_channels=9)))


def test_a_resolution_the_vae_cannot_take_is_refused(run, broken):
    folder = broken("vae/config.json", block_out_channels=[8] * 5)
    with pytest.raises(ModelError, match="multiple of 16"):
        run(pretrained_model_name_or_path=str(folder), resolution=24)


@pytest.mark.parametrize(("resolution", "told"), [(32, False), (64, False), (128, True)])
def test_a_resolution_far_from_the_models_own_is_told(configure, caplog, resolution, told):
    make_plan(configure(resolution=resolution))
    assert ("--resolution 32 is its own" in caplog.text) == told


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_refused(run, broken, part):
    folder = broken("model_index.json")
    (weights_file,) = (folder / part).glob("*.safetensors")
    weights_file.rename(weights_file.with_suffix(".bin"))
    with pytest.raises(ModelError, match="pickled"):
        run(pretrained_model_name_or_path=str(folder))


def test_a_folder_without_model_index_is_refused(run, broken):
    folder = broken("model_index.json")
    (folder / "model_index.json").unlink()
    with pytest.raises(ModelError, match=r"model_index\.json"):
        run(pretrained_model_name_or_path=str(folder))


def test_a_variant_comes_out_under_plain_names(run, broken):
    folder = broken("model_index.json")
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    result = run(pretrained_model_name_or_path=str(folder), variant="fp16", max_train_steps=3)
    StableDiffusionPipeline.from_pretrained(result.output_dir, local_files_only=True)
    assert not list(result.output_dir.glob("*/*.fp16.*"))


def add_safety_checker(folder: Path, file: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/config.json").write_text("{}")
    (folder / "safety_checker" / file).write_bytes(b"weights")


def test_the_scheduler_says_what_the_unet_was_trained_to_predict(run, pipeline):
    trained = run(prediction_type="v_prediction").output_dir / "scheduler"
    source = json.loads((pipeline / "scheduler/scheduler_config.json").read_text())
    assert source.get("prediction_type", "epsilon") == "epsilon"
    assert json.loads((trained / "scheduler_config.json").read_text()) == {**source, "prediction_type": "v_prediction"}
    assert DDPMScheduler.from_pretrained(trained).config.prediction_type == "v_prediction"


def test_a_safety_checker_is_copied(run, broken):
    folder = broken("model_index.json")
    add_safety_checker(folder, "model.safetensors")
    result = run(pretrained_model_name_or_path=str(folder), max_train_steps=3)
    for file in ("config.json", "model.safetensors"):
        copied = result.output_dir / "safety_checker" / file
        assert copied.read_bytes() == (folder / "safety_checker" / file).read_bytes()


def test_parts_that_could_not_be_copied_are_refused_before_training(configure, broken):
    folder = broken("model_index.json")
    add_safety_checker(folder, "model.fp16.safetensors")
    with pytest.raises(ModelError, match="safety_checker"):
        make_plan(configure(pretrained_model_name_or_path=str(folder)))
    shutil.rmtree(folder / "safety_checker")
    with pytest.raises(ModelError, match="holds no such folder"):
        make_plan(configure(pretrained_model_name_or_path=str(folder)))


# Checkpoints.


def test_a_changed_setting_is_refused_by_name_and_changes_nothing(run):
    settings = {"max_train_steps": 6, "checkpointing_steps": 3}
    folder = run(**settings).output_dir
    before = (folder / "memguard/config.json").read_bytes()
    with pytest.raises(CheckpointError, match="learning_rate"):
        run(**settings, learning_rate=2e-3, resume_from_checkpoint="latest")
    assert (folder / "memguard/config.json").read_bytes() == before
    run(max_train_steps=6, checkpointing_steps=2, proxy_store="disk", resume_from_checkpoint="checkpoint-3")


def damage(folder: Path, how: str) -> None:
    file = folder / UNET
    content = bytearray(file.read_bytes())
    if how == "missing file":
        file.unlink()
    elif how == "missing manifest":
        (folder / "manifest.json").unlink()
    elif how == "truncated":
        file.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["missing file", "missing manifest", "truncated", "flipped bit"])
def test_a_damaged_checkpoint_is_passed_over(run, caplog, how):
    settings = {"max_train_steps": 6, "checkpointing_steps": 2}
    folder = run(**settings).output_dir
    expected = results(folder)
    damage(folder / "checkpoint-6", how)
    (folder / "memguard/summary.json").unlink()  # as if it had been stopped before its end
    assert run(**settings, resume_from_checkpoint="latest").output_dir == folder
    assert "checkpoint-6" in caplog.text
    assert results(folder) == expected


def test_only_damaged_checkpoints_are_refused(run):
    settings = {"max_train_steps": 6, "checkpointing_steps": 6}
    folder = run(**settings).output_dir
    damage(folder / "checkpoint-6", "truncated")
    (folder / "memguard/summary.json").unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        run(**settings, resume_from_checkpoint="latest")


def test_old_checkpoints_are_removed(run):
    folder = run(max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=1).output_dir
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-6"]
    assert not list(folder.glob("writing-*"))


# Runs that are over, and runs that go on for longer.


def test_a_finished_run_is_left_as_it_is(run, caplog):
    settings = {"max_train_steps": 6, "checkpointing_steps": 4}
    first = run(**settings)
    before = {path: path.stat().st_mtime_ns for path in first.output_dir.rglob("*.safetensors")}
    with caplog.at_level(logging.INFO, "sd_memguard"):
        again = run(**settings, resume_from_checkpoint="latest")
    assert "nothing is left to do" in caplog.text
    assert (again.output_dir, again.global_step) == (first.output_dir, 6)
    assert {path: path.stat().st_mtime_ns for path in first.output_dir.rglob("*.safetensors")} == before
    with pytest.raises(CheckpointError, match="learning_rate"):
        run(**settings, learning_rate=2e-3, resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match="max_train_steps"):
        run(**{**settings, "max_train_steps": 5}, resume_from_checkpoint="latest")


# The end of the shorter run: of a round, in the middle of one that the longer run makes longer, and uneven shards.
@pytest.mark.parametrize(
    ("short", "settings"),
    [(18, {}), (15, {}), (16, {}), (17, {"proxy": "lora", "rank": 2}), (17, {"memguard": "off"})],
    ids=["round-end", "mid-round", "uneven", "lora", "plain"],
)
def test_a_run_that_goes_on_for_longer_equals_one_that_was_meant_to(run, short, settings):
    settings = {**settings, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    whole = run("whole", **settings)
    run("longer", **settings, max_train_steps=short)
    longer = run("longer", **settings, resume_from_checkpoint="latest")
    assert results(longer.output_dir)[:-1] == results(whole.output_dir)[:-1]
    known = [json.loads((one.output_dir / "memguard/summary.json").read_text()) for one in (longer, whole)]
    assert known[0] | {"exports": []} == known[1] | {"exports": []}  # these name the folder


def test_rounds_keep_their_length_and_another_curve_of_the_rate_is_told(run, caplog):
    settings = {"steps_per_round": "auto", "checkpointing_steps": 4, "lr_scheduler": "cosine"}
    run(**settings, max_train_steps=12)
    longer = run(**settings, max_train_steps=600, num_shards=3, resume_from_checkpoint="checkpoint-8", dry_run=True)
    assert longer.global_step == 0
    run(**settings, max_train_steps=16, resume_from_checkpoint="latest")
    assert "follows the longer curve" in caplog.text


# Numbers that are not finite.


def plant_nan(monkeypatch, first: int, last: int) -> None:
    """Turn one loss of the forwards `first` to `last` (counted from 1) into NaN."""
    compute, calls = DenoisingLoss.__call__, []

    def poisoned(self, *args, **options):
        losses = compute(self, *args, **options)
        calls.append(1)
        factor = torch.ones_like(losses)
        factor[0] = torch.nan if first <= len(calls) <= last else 1
        return losses * factor

    monkeypatch.setattr(DenoisingLoss, "__call__", poisoned)


def test_a_step_with_a_nan_is_left_out_and_its_sample_named(run, monkeypatch, caplog):
    plant_nan(monkeypatch, 3, 3)
    result = run(max_train_steps=12)
    assert result.summary["nonfinite_steps"] == 1
    assert caplog.text.count("secret-") >= 1
    assert "timestep" in caplog.text
    assert all(tensor.isfinite().all() for tensor in weights(result.output_dir).values())

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for line in (result.output_dir / "memguard/rounds.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_many_nans_stop_the_run_with_the_weights_before(configure, monkeypatch):
    plan = make_plan(configure(memguard="off"))
    trainer = Trainer(plan, make_accelerator(plan.config))
    before = {name: tensor.clone() for name, tensor in trainer.unet.state_dict().items()}
    plant_nan(monkeypatch, 1, 100)
    with StopRequest() as stop, trainer.log, pytest.raises(NonFiniteError):
        trainer.fit(stop)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.unet.state_dict().items())
