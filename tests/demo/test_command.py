import json
import shutil

import pytest
import torch
from PIL import Image

from sd_memguard.assets import tiny_sd_path
from sd_memguard.audit.images import Images
from sd_memguard.demo import command as demo
from sd_memguard.errors import UserError


@pytest.fixture
def quick(monkeypatch):
    """The demonstration with the bundled model itself in place of both fine-tunes, few captions and two steps."""

    def fine_tune(arm, settings):
        shutil.copytree(tiny_sd_path(), settings.output_dir / arm)
        return demo.Training(heldout_loss=0.08, train_loss=0.07, seconds=1.0)

    monkeypatch.setattr(demo, "fine_tune", fine_tune)
    monkeypatch.setattr(demo, "NUM_INFERENCE_STEPS", 2)
    monkeypatch.setattr(demo, "CAPTIONS_PER_KIND", 3)


def test_two_equal_models_come_out_equal_twice_in_one_folder(quick, tmp_path, capsys):
    folder = tmp_path / "runs" / "demo"
    for _ in range(2):
        demo.main(["--output_dir", str(folder), "--images_per_caption", "2"])
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [*demo.ARMS, "audit", "compare.png", "results.json", demo.MARKER]
    )
    audited = json.loads((folder / "audit" / "report.json").read_text(encoding="utf-8"))
    plain, guarded = audited["models"]
    assert (plain["name"], guarded["name"]) == ("plain", "guarded")
    assert plain["copies"] == guarded["copies"]
    with Image.open(folder / "compare.png") as image:
        assert image.width == 1200
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["models"]["plain"] == results["models"]["guarded"]
    generated = results["generated"]
    assert len(generated) == 2 * 2 * 3 * 2
    assert [row | {"model": ""} for row in generated[:12]] == [row | {"model": ""} for row in generated[12:]]
    assert len({row["seed"] for row in generated}) == 12
    assert all(row["is_copy"] == (row["ratio"] < 0.5) for row in generated)
    printed = capsys.readouterr().out
    assert printed.count("no clear difference") == 2 * 2
    assert printed.count("Replacing the earlier demonstration") == 1
    assert str(folder / "compare.png") in printed
    page = folder / "audit" / "report.html"
    assert str(page) in printed
    assert "<html" in page.read_text(encoding="utf-8")


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


@pytest.mark.parametrize("flags", [["--images_per_caption", "0"], ["--max_train_steps", "many"], ["--steps", "3"]])
def test_flags_out_of_range_end_the_program(flags, capsys):
    with pytest.raises(SystemExit) as end:
        demo.parse_arguments(flags)
    assert end.value.code == 2
    assert flags[0] in capsys.readouterr().err


def copies(*numbers):
    """(C, 4) bool: how many of each caption's 4 generated images are copies."""
    return torch.tensor([[index < number for index in range(4)] for number in numbers])


@pytest.mark.parametrize(
    ("plain", "guarded", "words"),
    [
        (copies(4, 3, 4, 3), copies(1, 0, 1, 1), "14 plain and 3 guarded are near copies: fewer with the guard"),
        (copies(0, 0, 1, 0), copies(2, 2, 3, 2), "1 plain and 9 guarded are near copies: more with the guard"),
        (copies(4, 0, 0, 0), copies(0, 0, 0, 0), "4 plain and 0 guarded are near copies: no clear difference"),
        (copies(0, 0, 0, 0), copies(0, 0, 0, 0), "0 plain and 0 guarded are near copies: no clear difference"),
        (copies(4, 4, 4, 4), copies(0, 0, 0, 0), "16 plain and 0 guarded are near copies: fewer with the guard"),
    ],
)
def test_the_sentence_on_copies_follows_from_the_numbers(plain, guarded, words):
    assert words in demo.compare_copies(plain, guarded)


def test_the_sentence_on_losses_follows_from_the_numbers():
    assert "1.0% higher (worse)" in demo.compare_losses(0.1, 0.101)
    assert "1.0% lower (better)" in demo.compare_losses(0.1, 0.099)
    assert "equals" in demo.compare_losses(0.07381, 0.07383)


def test_the_closest_generated_image_is_shown_and_known_whose_copy_it_is():
    pixels = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 2, 2, 3)
    images = Images(["0", "1", "2", "3"], ["a", "b", "c", "d"], pixels)
    ratio = torch.tensor([[0.9, 0.8], [0.7, 0.2]])
    generated = demo.Measured(pixels.unflatten(0, (2, 2)), ratio, ratio, torch.tensor([[0, 1], [2, 3]]), ratio < 0.5)
    own = demo.closest_generated(generated, 1, images, row=3)
    assert own.image.getpixel((0, 0)) == (3, 3, 3)
    assert own[1:] == (pytest.approx(0.2), True, True)
    assert demo.closest_generated(generated, 1, images, row=0)[2:] == (True, False)
    assert demo.closest_generated(generated, 0, images, row=1)[1:] == (pytest.approx(0.8), False, True)
