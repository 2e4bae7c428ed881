"""The benchmark's datasets, measures and tables."""

import json

import pytest
import torch
from PIL import Image

from benchmarks.memorization.datasets import NUM_COPIES, NUM_DUPLICATED, CaptionedImage, load_dataset, training_folder
from benchmarks.memorization.judge import precision_and_recall
from benchmarks.memorization.plot import plot
from benchmarks.memorization.table import differences, read_results, share, table


def rows_of(folder):
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [((folder / row["file_name"]).read_bytes(), row["text"]) for row in map(json.loads, lines)]


@pytest.mark.parametrize("name", ["avatars", "emoji"])
def test_training_folders_hold_what_their_names_say(name, tmp_path):
    dataset = load_dataset(name)
    trained, heldout = ({image.png for image in images} for images in dataset)
    assert len(trained) == len(dataset.train)
    assert len(heldout) == 256
    assert not trained & heldout
    kinds = ("exact", "near", "none", "absent")
    exact, near, none, absent = (rows_of(training_folder(dataset, kind, tmp_path / kind)) for kind in kinds)
    duplicated = [image.png for image in dataset.train[:NUM_DUPLICATED]]
    images = [png for png, _ in exact]
    assert [images.count(png) for png in duplicated] == [NUM_COPIES] * NUM_DUPLICATED
    assert len(exact) == len(near) == len(trained) + NUM_DUPLICATED * (NUM_COPIES - 1)
    assert sorted(png for png, _ in none) == sorted(trained)
    assert sorted(png for png, _ in absent) == sorted(trained - set(duplicated))
    # Of near-duplicates no two files are equal, and all captions consist of the original ones' words.
    assert len({png for png, _ in near}) == len(near)
    words = {word for image in dataset.train for word in image.text.replace(",", "").split()}
    assert {word for _, text in near for word in text.replace(",", "").split()} <= words


def test_a_folder_that_is_there_is_not_written_again(tmp_path):
    image = CaptionedImage(b"", "a caption", {}, {})
    (tmp_path / "metadata.jsonl").write_text("mine")
    dataset = load_dataset("emoji")._replace(train=[image])
    assert training_folder(dataset, "none", tmp_path) == tmp_path
    assert (tmp_path / "metadata.jsonl").read_text() == "mine"


def test_precision_and_recall_of_two_clusters():
    """Real images at 0 and at 100; what is generated lies at 0: all of it is real, and half of what is real is met."""
    spread = torch.arange(8.0)[:, None] / 10
    real, generated = torch.cat([spread, spread + 100]), spread + 0.05
    assert precision_and_recall(generated, real) == {"precision": 1.0, "recall": 0.5}
    assert precision_and_recall(real, real) == {"precision": 1.0, "recall": 1.0}


def make_result(variant, seed, own, loss):
    one = {"prompts": 4, "copies": "0" * len(own), "own": own}
    return {
        "case": {"dataset": "emoji", "duplicates": "exact", "variant": variant, "seed": seed},
        "step": 900,
        "replication": {"duplicated": one, "unique": one, "heldout": one},
        "losses": {"heldout": {"mean": loss, "by_image": [loss - 0.01, loss + 0.01]}, "unique": {"mean": 0.75 * loss}},
        "quality": {"kid": 0.1, "precision": 0.5, "recall": 0.25},
        "image_forwards": 14400,
    }


@pytest.fixture
def groups(tmp_path):
    made = [make_result("plain", 0, "11110000", 0.07), make_result("plain", 1, "11111111", 0.08)]
    made.append(make_result("default", 0, "00000000", 0.06))
    for number, result in enumerate(made):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    return read_results(tmp_path)


def test_shares_are_means_over_prompts_and_seeds(groups):
    plain = groups["emoji", "exact"]["plain", 900]
    value, low, high = share(plain, "duplicated", "own")
    assert value == 0.75
    assert 0.5 <= low < value < high <= 1.0
    assert share(plain[1:], "duplicated", "own") == (1.0, 1.0, 1.0)


def test_the_table_has_a_row_for_each_variant(groups):
    lines = list(table(groups["emoji", "exact"]))
    assert lines[2].startswith("| plain | 900 | 2 | 75% (")
    assert lines[2].endswith("| 0%, 0% | - | 0.0750 | 25% | - | 100.00 | 0.50, 0.25 | 14,400 |")
    assert lines[3].startswith("| **the default** | 900 | 1 |")
    assert lines[-1].startswith("For scale")


def test_runs_without_the_duplicates_are_rows_beside_those_with_them(tmp_path):
    made = [make_result("plain", 0, "11110000", 0.07), make_result("plain", 0, "00000000", 0.06)]
    made[1]["case"]["duplicates"] = "none"
    for number, result in enumerate(made):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    groups = read_results(tmp_path)
    assert list(groups) == [("emoji", "exact")]
    lines = list(table(groups["emoji", "exact"]))
    assert lines[3].startswith("| plain, each image once | 900 | 1 | 0% (")
    assert list(differences(groups["emoji", "exact"]))[-1].startswith("| plain, each image once | 900 | 1 | -50 (")


def test_differences_to_plain_training_are_paired_by_seed(groups):
    lines = list(differences(groups["emoji", "exact"]))
    # The default has seed 0 alone: its shares are compared with those of that seed, 4 of 8, and not with the mean.
    assert lines[2].startswith("| **the default** | 900 | 1 | -50 (")
    assert lines[2].endswith("| - | - | - | -14.3% (-14.3% to -14.3%) |")
    assert len(lines) == 3


def test_lora_is_compared_with_plain_lora():
    made = [make_result("plain", 0, "11111111", 0.07), make_result("lora_plain", 0, "11110000", 0.08)]
    made.append(make_result("lora_default", 0, "00000000", 0.06))
    made.append(make_result("lora4_default", 0, "00000000", 0.06))  # of a rank without a plain run
    lines = list(differences({(one["case"]["variant"], 900): [one] for one in made}))
    assert len(lines) == 3
    assert lines[2].startswith("| LoRA, the default | 900 | 1 | -50 (")


def test_the_plot_is_written(groups, tmp_path):
    plot(groups, tmp_path / "plots" / "memorization.png")
    with Image.open(tmp_path / "plots" / "memorization.png") as image:
        assert image.width > 300
