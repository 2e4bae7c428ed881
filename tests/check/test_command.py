"""A folder in which everything that a check finds is planted."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from sd_memguard.check import parts
from sd_memguard.check.command import main
from sd_memguard.errors import UserError
from tests.core.test_local_features import scene


def smooth(seed, size=(96, 96)):
    """Return a smooth image unlike those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Five good images; then a damaged one, one without caption, copies and oddities."""
    place = tmp_path / "images"
    place.mkdir()
    images = {f"good-{number}.png": smooth(number) for number in range(5)}
    images["smaller.jpg"] = smooth(0).resize((48, 48))
    images["cropped.png"] = smooth(1).crop((3, 2, 92, 94))
    images["flipped.png"] = ImageOps.mirror(smooth(2))
    images["long.png"] = smooth(7, (400, 60))
    images["flat.png"] = Image.new("RGB", (96, 96), (200, 200, 200))
    images["silent.png"] = smooth(8)
    for name, image in images.items():
        image.save(place / name)
    (place / "equal.png").write_bytes((place / "good-3.png").read_bytes())
    (place / "damaged.png").write_bytes((place / "good-4.png").read_bytes()[:200])
    for file in place.iterdir():
        if file.stem not in ("silent",):
            file.with_suffix(".txt").write_text("long " * 80 if file.stem == "good-4" else f"caption of {file.stem}")
    return place


def check(folder, *flags):
    status = main([str(folder), "--output_dir", str(folder.parent / "out"), *flags])
    return status, json.loads((folder.parent / "out" / "check.json").read_text(encoding="utf-8"))


def groups(report):
    return {frozenset(group["files"]): (group["exact"], group["kept"]) for group in report["duplicates"]}


def test_everything_planted_is_found_and_nothing_else(folder):
    status, report = check(folder)
    assert status == 1
    assert set(report["unusable"]) == {"damaged.png", "silent.png"}
    assert "has no caption" in report["unusable"]["silent.png"]
    assert set(report["odd"]) == {"long.png", "flat.png", "good-4.png"}
    assert "80 words" in report["odd"]["good-4.png"]
    assert groups(report) == {
        frozenset({"good-3.png", "equal.png"}): (True, "equal.png"),
        frozenset({"good-0.png", "smaller.jpg"}): (False, "good-0.png"),
        frozenset({"good-1.png", "cropped.png"}): (False, "good-1.png"),
    }
    _, report = check(folder, "--duplicates_flip", "--resolution", "64")
    assert frozenset({"good-2.png", "flipped.png"}) in groups(report)
    assert report["odd"]["smaller.jpg"] == "is smaller than 64 px (48x48)"


def test_what_is_kept_can_be_trained_on(folder, tmp_path):
    kept = tmp_path / "kept.txt"
    main([str(folder), "--write_filtered", str(kept)])
    names = kept.read_text().split()
    assert "good-0.png" in names
    assert not {"smaller.jpg", "cropped.png", "good-3.png", "damaged.png", "silent.png"} & set(names)
    metadata = tmp_path / "metadata.jsonl"
    main([str(folder), "--write_filtered", str(metadata)])
    rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
    assert [row["file_name"] for row in rows] == names
    # Put into a folder of the kept files alone, there is nothing left to find but what is odd.
    clean = tmp_path / "clean"
    clean.mkdir()
    odd = {"long.png", "flat.png", "good-4.png"}
    for row in rows:
        if row["file_name"] not in odd:
            (clean / row["file_name"]).write_bytes((folder / row["file_name"]).read_bytes())
    (clean / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows if row["file_name"] not in odd))
    assert main([str(clean)]) == 0


def test_the_page_shows_each_group_and_cannot_be_broken_by_captions(folder):
    (folder / "good-0.txt").write_text("<script>alert(1)</script>")
    check(folder)
    text = (folder.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/jpeg;base64,") == 6
    assert "&lt;script&gt;" in text
    assert "<script" not in text


def test_bare_images_are_checked_as_well(tmp_path, capsys):
    for number in range(3):
        smooth(number).save(tmp_path / f"{number}.png")
    assert main([str(tmp_path)]) == 0
    assert "There are no captions." in capsys.readouterr().out


def test_what_cannot_be_checked_is_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        main([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match=r"must end in .txt or .jsonl"):
        main([str(tmp_path), "--write_filtered", "list.csv"])


def test_the_command_gives_scripts_a_status(tmp_path):
    smooth(0).save(tmp_path / "a.png")
    smooth(0).save(tmp_path / "b.png")
    done = subprocess.run([sys.executable, "-m", "sd_memguard", "check", str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "  2 times: a.png, b.png")
    done = subprocess.run([sys.executable, "-m", "sd_memguard", "check", str(tmp_path / "c")], capture_output=True)
    assert done.returncode == 2


def test_images_that_share_a_part_are_named_where_asked_for(tmp_path):
    pytest.importorskip("cv2")
    place = tmp_path / "images"
    place.mkdir()
    for seed in range(4):
        scene(seed).save(place / f"{seed}.png")
    scene(1).crop((60, 60, 220, 190)).save(place / "part.png")
    status, report = check(place)
    assert (status, report["shared_parts"]) == (0, [])
    status, report = check(place, "--local_features")
    assert status == 1
    assert [one["files"] for one in report["shared_parts"]] == [["1.png", "part.png"]]
    assert "1 pairs" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_too_many_images_for_local_features_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MAX_IMAGES", 1)
    for seed in range(2):
        smooth(seed).save(tmp_path / f"{seed}.png")
    with pytest.raises(UserError, match="at most 1 images, got 2"):
        main([str(tmp_path), "--local_features"])
