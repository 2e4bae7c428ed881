"""The right images in the right order, by their pixels, and what happens when they are gone."""

import numpy as np
import pytest
from PIL import Image

from sd_memguard import assets
from sd_memguard.errors import UserError
from sd_memguard.inspection.contact_sheet import (
    EMPTY,
    IMAGE,
    contact_sheet,
    image_box,
    image_folder,
    image_loader,
)
from sd_memguard.inspection.summary import memory_prone_rows
from sd_memguard.runs.folder import read_run
from tests.inspection.test_summary import NASTY


def row(file: str, caption: str = "a caption") -> dict:
    counts = {"seen": 3, "skipped": 1, "augmented": 1, "moves": 0, "skip_ratio": 2 / 3, "shard": 0}
    return {"sample_id": 0, "file": file, "caption": caption, **counts}


def cell(sheet: Image.Image, index: int) -> np.ndarray:
    return np.asarray(sheet.crop(image_box(index)))


def background(sheet: Image.Image, index: int) -> str:
    """The commonest colour in the cell of an image."""
    colours, counts = np.unique(cell(sheet, index).reshape(-1, 3), axis=0, return_counts=True)
    return "#" + "".join(f"{value:02x}" for value in colours[counts.argmax()])


def test_the_images_of_a_run_in_their_order(finished_run, images):
    run = read_run(finished_run.output_dir)
    rows = memory_prone_rows(run, 7)
    assert len({entry["file"] for entry in rows}) == 7
    sheet = contact_sheet(rows, image_loader(image_folder(run, None)), ["a note"])
    for index, entry in enumerate(rows):
        original = Image.open(images / entry["file"]).convert("RGB")
        expected = np.asarray(original.resize((IMAGE, IMAGE), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(cell(sheet, index), expected)


def test_a_image_keeps_its_proportions(tmp_path):
    Image.new("RGB", (40, 10), "#ff0000").save(tmp_path / "wide.png")
    sheet = contact_sheet([row("wide.png")], image_loader(tmp_path), [])
    red = (cell(sheet, 0) == (255, 0, 0)).all(axis=2)
    assert red.sum() == IMAGE * IMAGE // 4
    assert red[IMAGE // 2].all()


@pytest.mark.parametrize("file", ["gone.png", "../outside.png", "text.png", "x" * 3000])
def test_a_image_that_cannot_be_read_is_an_empty_frame(tmp_path, file):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (8, 8), "#ff0000").save(folder / "there.png")
    Image.new("RGB", (8, 8), "#00ff00").save(tmp_path / "outside.png")
    (folder / "text.png").write_text("no image")
    sheet = contact_sheet([row(file), row("there.png")], image_loader(folder), [])
    assert background(sheet, 0) == EMPTY
    assert background(sheet, 1) == "#ff0000"
    assert len(np.unique(cell(sheet, 0))) > 3  # its name is written there


def test_without_a_folder_all_frames_are_empty():
    sheet = contact_sheet([row("a.png"), row("b.png")], None, [])
    assert background(sheet, 0) == background(sheet, 1) == EMPTY
    assert not np.array_equal(cell(sheet, 0), cell(sheet, 1))


@pytest.mark.parametrize("words", NASTY, ids=range(len(NASTY)))
def test_nasty_words_stay_below_their_image(tmp_path, words):
    Image.new("RGB", (8, 8), "#ff0000").save(tmp_path / "red.png")
    rows = [row("red.png", "short"), row("red.png", words), row("red.png", "short")]
    sheet = contact_sheet(rows, image_loader(tmp_path), [words])
    plain = contact_sheet([rows[0], row("red.png", ""), rows[2]], image_loader(tmp_path), [words])
    assert sheet.size == plain.size
    difference = np.argwhere((np.asarray(sheet) != np.asarray(plain)).any(axis=2))
    left, _, right, bottom = image_box(1)
    assert len(difference)
    assert bottom < difference[:, 0].min() <= difference[:, 0].max() < sheet.height
    assert left - 4 <= difference[:, 1].min() <= difference[:, 1].max() <= right + 4


def test_where_images_are_looked_for(finished_run, images, tmp_path):
    run = read_run(finished_run.output_dir)
    assert image_folder(run, None) == images
    assert image_folder(run, str(tmp_path)) == tmp_path
    assert image_folder(run, "bundled") == assets.demo_data_path()
    with pytest.raises(UserError, match="--train_data_dir"):
        image_folder(run, str(tmp_path / "nothing"))
    run.config["train_data_dir"] = "bundled"
    assert image_folder(run, None) == assets.demo_data_path()
    run.config["train_data_dir"] = str(tmp_path / "nothing")
    assert image_folder(run, None) is None
    run.config.update({"dataset_name": "some/set", "train_data_dir": None})
    assert image_folder(run, None) is None
