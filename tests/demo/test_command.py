import json
import shutil
from functools import partial

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sd_memguard.assets import demo_data_path, tiny_sd_path
from sd_memguard.audit import attribute_probe
from sd_memguard.audit.metrics import attributes
from sd_memguard.demo import command as demo
from sd_memguard.demo import measure
from sd_memguard.errors import UserError

TRAITS = ("skin", "shirt")


@pytest.fixture
def quick(monkeypatch):
    """The demonstration with the bundled model itself in place of both fine-tunes, few prompts and two steps."""

    def fine_tune(model, settings):
        shutil.copytree(tiny_sd_path(), settings.output_dir / model)
        return demo.Training(heldout_loss=0.08, train_loss=0.07, seconds=1.0)

    monkeypatch.setattr(demo, "fine_tune", fine_tune)
    monkeypatch.setattr(demo, "NUM_PROMPTS", 3)
    monkeypatch.setattr(demo, "NUM_HELDOUT_PROMPTS", 2)
    monkeypatch.setattr(demo, "NUM_PROBES", 4)
    monkeypatch.setattr(demo, "NUM_INFERENCE_STEPS", 2)
    monkeypatch.setattr(measure, "NUM_INFERENCE_STEPS", 2)
    quickly = partial(attributes.train_classifier, num_steps=3)
    monkeypatch.setattr(attribute_probe, "train_classifier", quickly)


def test_two_equal_models_come_out_equal_twice_in_one_folder(quick, tmp_path, capsys):
    folder = tmp_path / "runs" / "demo"
    for _ in range(2):
        demo.main(["--output_dir", str(folder), "--num_images_per_prompt", "2"])
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [*demo.MODELS, "audit", "compare.png", "results.json", demo.MARKER]
    )
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["models"]["plain"] == results["models"]["guarded"]
    generated = results["generated"]
    halves = [[row | {"model": ""} for row in generated if row["model"] == model] for model in demo.MODELS]
    assert halves[0] == halves[1]
    assert len(halves[0]) == 2 * 3 * 2 + 2
    copied = [row["is_copy"] for row in pq.read_table(folder / "audit" / "pairs.parquet").to_pylist()]
    assert [row["is_copy"] for row in generated if row["is_copy"] is not None] == copied
    with Image.open(folder / "compare.png") as image:
        assert image.width == 1280
    printed = capsys.readouterr().out
    assert printed.count("Replacing the earlier demonstration") == 1
    assert str(folder / "compare.png") in printed
    page = folder / "audit" / "report.html"
    assert str(page) in printed
    assert "<html" in page.read_text(encoding="utf-8")


def test_training_images_themselves_are_copies_in_every_trait(monkeypatch):
    """Figures of real training images: all they show agrees; with another's prompt only some does."""
    lines = (demo_data_path() / "attributes.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    named = {demo_data_path() / row["file_name"]: row["named"] for row in rows}
    opened = {demo_data_path() / row["file_name"]: row["open"] for row in rows}

    class Oracle:
        def __init__(self):
            self.values = {name: sorted({one[name] for one in named.values() if name in one}) for name in TRAITS}

        def predict(self, images):
            return [truth[image.numpy().tobytes()] for image in images]

    files = list(named)[:40]
    pixels = measure._stack([Image.open(file).convert("RGB") for file in files])
    truth = {one.numpy().tobytes(): named[file] | opened[file] for one, file in zip(pixels, files, strict=True)}
    known = measure.Known(named, opened, [named[file] | opened[file] for file in files], Oracle())

    def generated(originals, images):
        return [
            measure.Generated(
                "plain", "unique", "", original, Image.open(image).convert("RGB"), original == image, None
            )
            for original, image in zip(originals, images, strict=True)
        ]

    own = measure.figures(generated(files, files), known)["plain"]["unique"]
    assert (own.num_images, own.own, own.copies) == (40, 1.0, None)
    assert (own.caption_accuracy, own.open_agreement) == (1.0, 1.0)
    others = measure.figures(generated(files, files[1:] + files[:1]), known)["plain"]["unique"]
    assert others.own == 0
    assert others.caption_accuracy < 0.8
    assert others.open_agreement < 0.8
    assert torch.tensor(others.chance).isfinite()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="`--output_dir` must be new, empty or an earlier demonstration"):
        demo.main(["--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="is a file"):
        demo.main(["--output_dir", str(tmp_path / "plain" / "thesis.txt")])
    assert (tmp_path / "plain" / "thesis.txt").read_text() == "years of work"


def test_an_earlier_demonstration_is_cleared_of_its_own_files_only(tmp_path, capsys):
    demo.prepare_folder(tmp_path)
    assert capsys.readouterr().out == ""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "model_index.json").write_text("{}")
    (tmp_path / "compare.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("mine")
    demo.prepare_folder(tmp_path)
    assert "Replacing" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", demo.MARKER]


def test_a_linked_model_folder_is_unlinked_not_emptied(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "demo"
    kept.mkdir()
    (kept / "model_index.json").write_text("{}")
    demo.prepare_folder(folder)
    (folder / "plain").symlink_to(kept, target_is_directory=True)
    demo.prepare_folder(folder)
    assert not (folder / "plain").exists()
    assert (kept / "model_index.json").exists()


@pytest.mark.parametrize("flags", [["--num_images_per_prompt", "0"], ["--max_train_steps", "many"], ["--steps", "3"]])
def test_flags_out_of_range_end_the_program(flags, capsys):
    with pytest.raises(SystemExit) as end:
        demo.parse_arguments(flags)
    assert end.value.code == 2
    assert flags[0] in capsys.readouterr().err
