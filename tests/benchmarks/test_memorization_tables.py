"""The benchmark's tables: interpolation along plain training, falls at equal quality, and what --quick says."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks.memorization.compare import fall, find_place, shares_at
from benchmarks.memorization.judge import _copies, _recognized
from benchmarks.memorization.plot import plot
from benchmarks.memorization.quick import loss_interval, report
from benchmarks.memorization.table import along, equal_quality_table, read_cells, share, table
from sd_memguard.assets import demo_data_path
from sd_memguard.audit.features.extractors import make_extractor
from sd_memguard.audit.images import load_images
from sd_memguard.config import make_train_config
from sd_memguard.data.transforms import Preprocess


def make_cell(arm, step, seed, copies, loss, kid=0.1):
    """A cell of 4 captions with 4 generated images each; `copies` is the digit of each caption."""
    one = {"captions": 4, "generated": 16, "copies": sum(map(int, copies)), "copies_by_caption": copies}
    return {
        "arm": arm,
        "step": step,
        "seed": seed,
        "copies": {"repeated": one, "single": one | {"copies": 0, "copies_by_caption": "0000"}},
        "losses": {name: {"mean": loss} for name in ("heldout", "single")},
        "kid": {"mean": kid},
        "kid_latents": {"mean": kid},
        "extra_steps": 0,
        "image_forwards": 1600,
        "cpu_seconds_of_run": 12,
    }


@pytest.fixture
def cells(tmp_path):
    """Plain training goes down from 9 to 1 and up again; the arm ends at 3, so between the points at 5 and 1."""
    made = [
        make_cell("base", 0, 0, "0000", 9.0, 0.9),
        make_cell("plain", 100, 0, "4000", 5.0, 0.5),
        make_cell("plain", 200, 0, "4440", 1.0, 0.3),
        make_cell("plain", 300, 0, "4444", 2.0, 0.2),
        make_cell("agc", 300, 0, "1000", 3.0, 0.1),
    ]
    for cell in made:
        (tmp_path / f"{cell['arm']}-{cell['step']}-{cell['seed']}.json").write_text(json.dumps(cell))
    return tmp_path


@pytest.mark.parametrize(
    ("values", "wanted", "expected"),
    [
        ([9, 5, 1, 2], 3, (1, 0.5, True)),
        ([9, 5, 1, 2], 2, (1, 0.75, True)),  # on the way down, not where it comes up again
        ([9, 5, 1, 2], 9.5, (0, 0, True)),
        ([9, 5, 1, 2], 0.5, (2, 0, False)),  # never: the lowest point
        ([9, 5, 5, 4], 5, (0, 1, True)),
    ],
)
def test_the_first_place_that_is_as_good(values, wanted, expected):
    assert tuple(find_place(values, wanted)) == pytest.approx(expected)


def test_shares_between_two_points_are_their_weighted_mean(cells):
    curve = along(read_cells(cells), "plain", 0)
    assert [cell["step"] for cell in curve] == [0, 100, 200, 300]
    shares = shares_at(curve, find_place([9, 5, 1, 2], 2), "repeated")
    assert shares.tolist() == pytest.approx([1, 0.75, 0.75, 0])


def test_an_arm_is_set_beside_plain_training_of_the_same_loss(cells):
    points = read_cells(cells)
    found = fall(points["agc", 300], [along(points, "plain", 0)], "loss")
    # Half way between 1/4 and 3/4 of the generated images, against 1/16.
    assert (found.share, found.value, found.reached) == (0.5, pytest.approx(1 - (1 / 16) / 0.5), True)
    assert found.by_seed == [found.value]
    assert found.low <= found.value <= found.high


def test_an_arm_better_than_all_of_plain_training_is_set_beside_its_best(cells):
    points = read_cells(cells)
    found = fall(points["agc", 300], [along(points, "plain", 0)], "kid")
    assert (found.share, found.value, found.reached) == (1.0, pytest.approx(15 / 16), False)
    text = "\n".join(equal_quality_table(points))
    assert "| 100%* | 94% (" in text
    assert "| 50% | 88% (" in text


def test_seeds_are_compared_with_their_own_plain_training(cells):
    for cell in (
        make_cell("plain", 100, 1, "2000", 5.0),
        make_cell("plain", 200, 1, "2000", 1.0),
        make_cell("agc", 300, 1, "2000", 1.0),
    ):
        (cells / f"{cell['arm']}-{cell['step']}-1.json").write_text(json.dumps(cell))
    points = read_cells(cells)
    found = fall(points["agc", 300], [along(points, "plain", seed) for seed in (0, 1)], "loss")
    assert found.by_seed == pytest.approx([0.875, 0.0])
    assert found.value == pytest.approx(1 - (1 / 16 + 2 / 16) / (8 / 16 + 2 / 16))


def test_the_interval_covers_the_same_captions_on_both_sides(cells):
    """Where an arm copies the same half of each caption's generated images, resampling captions changes nothing."""
    half, whole = make_cell("agc", 300, 0, "2222", 5.0), make_cell("plain", 100, 0, "4444", 5.0)
    found = fall([half], [[make_cell("base", 0, 0, "0000", 9.0), whole]], "loss")
    assert (found.low, found.value, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_where_plain_training_does_not_copy_there_is_nothing_to_compare():
    arm, base = make_cell("agc", 300, 0, "1000", 9.0), make_cell("base", 0, 0, "0000", 9.0)
    assert fall([arm], [[base, make_cell("plain", 100, 0, "4444", 5.0)]], "loss") is None


def test_shares_and_rows(cells):
    points = read_cells(cells)
    assert share([make_cell("agc", 300, 0, "4000", 1.0)["copies"]["repeated"]])[0] == 0.25
    rows = list(table(points))
    assert rows[-1].startswith("| AGC, one model | 300 | 1 | 6% (")
    assert rows[-1].endswith("| - | - | 3.0000 | 3.0000 | 0.100 | 0.100 | 1,600 | 12 |")
    judged = make_cell("agc", 300, 0, "1000", 3.0)
    recognized = make_cell("agc", 300, 0, "4000", 3.0)["copies"]
    (row,) = list(table({("agc", 300): [judged | {"recognized": recognized}]}))[2:]
    assert [text.split(" ")[0] for text in row.split(" | ")[3:7]] == ["6%", "0%", "25%", "0%"]


def test_images_under_affine_maps_are_recognized_where_pixels_miss_most():
    images, ids = load_images(demo_data_path(), 64), list(range(0, 900, 9))
    extractor = make_extractor("bundled", None, torch.device("cpu"))
    exam = SimpleNamespace(images=images, rows={"single": ids}, extractor=extractor)
    config = make_train_config(pretrained="bundled", train_data_dir="bundled", resolution=64, random_affine=0.05)
    preprocess = Preprocess(config, 0)
    originals = [Image.fromarray(images.pixels[row].numpy()) for row in ids]
    seen = [preprocess.centered(image, bytes([n] * 16), preprocess.views[0]) for n, image in enumerate(originals)]
    moved = ((torch.stack(seen) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert _copies(exam, "single", moved)["copies"] < 0.5 * len(ids)
    assert _recognized(exam, "single", moved)["copies"] >= 0.97 * len(ids)
    others = images.pixels[[ids[-1], *ids[:-1]]]
    assert _recognized(exam, "single", others)["copies"] <= 0.03 * len(ids)


@pytest.mark.parametrize(
    ("copies", "loss", "verdicts"),
    [
        ("4440", 5.0004, ["copies of repeated captions 75%, inside", "5.0004, inside"]),
        ("0000", 5.0004, ["copies of repeated captions 0%, OUTSIDE", "5.0004, inside"]),
        ("4440", 5.002, ["copies of repeated captions 75%, inside", "5.0020, OUTSIDE"]),
    ],
)
def test_quick_says_what_is_as_published(copies, loss, verdicts):
    published = {
        ("agc", 300): [make_cell("agc", 300, 0, "4400", 5.0001), make_cell("agc", 300, 1, "4440", 4.9999)],
    }
    (line,) = report({("agc", 300): [make_cell("agc", 300, 0, copies, loss)]}, published)
    assert all(verdict in line for verdict in verdicts)
    (line,) = report({("agc", 600): [make_cell("agc", 600, 0, copies, loss)]}, published)
    assert line.endswith("nothing is published to compare with")


def test_the_interval_of_a_loss_grows_with_the_spread_of_the_seeds():
    spread = [make_cell("agc", 300, seed, "0000", loss) for seed, loss in enumerate((4.9, 5.0, 5.1))]
    assert loss_interval(spread) == pytest.approx((4.8, 5.2))


def test_the_plot_is_drawn_where_arms_and_measures_are_missing(cells):
    points = read_cells(cells)
    del points["agc", 300][0]["kid"]
    plot(points, cells / "plots" / "memorization.png")
    with Image.open(cells / "plots" / "memorization.png") as image:
        assert image.width > 1000
