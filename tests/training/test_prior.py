"""Prior preservation: the loss of DreamBooth written out, generated class images, and what the guard leaves alone."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from sd_memguard.config import ConfigError
from sd_memguard.core.seeding import derive_seed
from sd_memguard.data.samples import SampleError
from sd_memguard.training.plan import make_plan
from sd_memguard.training.signals import Interrupted, StopRequest
from sd_memguard.training.trainer import Trainer
from tests.conftest import write_images
from tests.reference.bare_loop import bare_loop
from tests.training.test_trainer import EPSILON, NEUTRAL, results, stop_at, weights

CAPTION = "a thing"
WEIGHT = 0.7


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory) -> Path:
    """Return a folder of ten class images without captions."""
    folder = write_images(tmp_path_factory.mktemp("class") / "images", [(32, 32)] * 10)
    (folder / "metadata.jsonl").unlink()
    return folder


@pytest.fixture
def prior(class_folder) -> dict:
    """Return the settings of a run with class images."""
    settings = {"with_prior_preservation": True, "class_data_dir": str(class_folder), "class_prompt": CAPTION}
    return {**settings, "num_class_images": 10, "prior_loss_weight": WEIGHT}


def captioned(folder: Path, images: Path) -> list[tuple[Path, str]]:
    """Copy the images that have one caption to a folder, and return them with it."""
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    single = [row for row in rows if isinstance(row["text"], str)]
    folder.mkdir()
    for row in single:
        shutil.copy(images / row["file_name"], folder)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in single))
    return [(folder / row["file_name"], row["text"]) for row in single]


@pytest.mark.parametrize("settings", [{"memguard": "off"}, {**NEUTRAL, "gradient_accumulation_steps": 2}])
def test_the_loss_is_that_of_dreambooth(run, images, pipeline, class_folder, prior, tmp_path, settings):
    pairs = captioned(tmp_path / "single", images)
    batch = 4 * settings.get("gradient_accumulation_steps", 1)
    common = {"train_data_dir": str(tmp_path / "single"), "max_train_steps": 6, "adam_epsilon": EPSILON}
    trained = run(**common, **prior, **settings)
    class_images = [(file, CAPTION) for file in sorted(class_folder.glob("*.png"))]
    expected = bare_loop(
        pipeline, pairs, 6, batch, 1e-3, EPSILON, 7, class_images, derive_seed(7, "class_images"), WEIGHT
    )
    torch.testing.assert_close(weights(trained.output_dir), expected, rtol=0, atol=1e-6)
    without = run("without", **common, **settings)
    assert any(not torch.equal(one, weights(without.output_dir)[name]) for name, one in expected.items())


def test_skipped_samples_leave_the_weight_of_the_class_images_as_it_is(configure, prior, monkeypatch):
    """The gradient is that of the mean over the clean samples, plus that of the weighted mean over the class images."""
    config = configure(**prior, num_shards=1, augment_threshold=0.0, max_train_steps=8)
    plan = make_plan(config)
    trainer = Trainer(plan, Accelerator())
    seen, gradients, losses = [], [], []
    step, of_class = trainer.optimizer_step.step, trainer.class_images.losses

    def record(scale):
        gradients.append([scale * parameter.grad.clone() for parameter in trainer.parameters])
        return step(scale)

    def record_class(model, loss, refs, batch):
        found = of_class(model, loss, refs, batch)
        wanted = torch.autograd.grad(found.mean(), trainer.parameters, retain_graph=True)
        losses.append(wanted)
        return found

    weigh = trainer.guard.weigh

    def record_batch(batch_losses, *args, **kwargs):
        verdict = weigh(batch_losses, *args, **kwargs)
        clean = ~verdict.skip_mask
        if clean.any():
            mean = batch_losses[clean].mean()
            seen.append((int(clean.sum()), torch.autograd.grad(mean, trainer.parameters, retain_graph=True)))
        return verdict

    monkeypatch.setattr(trainer.optimizer_step, "step", record)
    monkeypatch.setattr(trainer.class_images, "losses", record_class)
    monkeypatch.setattr(trainer.guard, "weigh", record_batch)
    trainer.fit(StopRequest())
    assert len(seen) == len(gradients) == len(losses)
    assert min(count for count, _ in seen) < 4
    for (_, clean), class_gradient, total in zip(seen, losses, gradients, strict=True):
        expected = [a + WEIGHT * b for a, b in zip(clean, class_gradient, strict=True)]
        torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"proxy": "lora", "rank": 2}, {"cache_latents": "off"}])
def test_a_resumed_run_equals_one_that_was_not_stopped(run, prior, monkeypatch, settings):
    whole = run("whole", **prior, **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(Interrupted):
            run("parts", **prior, **settings)
    parts = run("parts", **prior, **settings, resume_from_checkpoint="latest")
    assert results(parts.output_dir)[:-1] == results(whole.output_dir)[:-1]  # the summary of LoRA names its file


def test_class_images_are_in_no_record(run, prior, images):
    trained = run(**prior, max_train_steps=6)
    table = pq.read_table(trained.output_dir / "memguard/samples.parquet").to_pydict()
    assert len(table["file"]) == len(list(images.glob("*.png")))
    assert sum(table["seen"]) == 6 * 4
    assert trained.summary["image_forwards"] >= 2 * 6 * 4


def test_missing_class_images_are_generated_once(run, prior, tmp_path, capsys):
    folder = tmp_path / "new"
    prior |= {"class_data_dir": str(folder), "num_class_images": 3}
    run("dry", **prior, max_train_steps=3, dry_run=True)
    assert "3 of them to be generated first" in capsys.readouterr().out
    assert not folder.exists()
    run("first", **prior, max_train_steps=3)
    made = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert sorted(made) == ["class-00000.png", "class-00001.png", "class-00002.png"]
    assert {Image.open(folder / name).size for name in made} == {(32, 32)}
    assert len(set(made.values())) == 3
    (folder / "class-00001.png").unlink()  # one in the middle: those beside it stay as they are
    untouched = (folder / "class-00002.png").stat().st_mtime_ns
    run("second", **prior, max_train_steps=3)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == made
    assert (folder / "class-00002.png").stat().st_mtime_ns == untouched


def test_what_cannot_be_had_is_refused(run, configure, prior, tmp_path):
    with pytest.raises(ConfigError, match="must be given together"):
        configure(with_prior_preservation=True)
    with pytest.raises(ConfigError, match=r"holds 10 images and `--num_class_images` asks for 11"):
        run(**{**prior, "num_class_images": 11, "class_prompt": None})
    with pytest.raises(SampleError, match=r"`--class_data_dir` .* holds 10 images, but no captions"):
        run(**{**prior, "class_prompt": None})
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "one.png").write_bytes(b"no image")
    with pytest.raises(SampleError, match=r"one\.png"):
        run(**{**prior, "class_data_dir": str(bad), "num_class_images": 1})
