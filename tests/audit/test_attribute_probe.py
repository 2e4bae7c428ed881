"""Attributes of coloured squares, from folders to figures."""

import json
from functools import partial

import pytest
import torch
from PIL import Image

from sd_memguard.audit import AuditError, attribute_probe
from sd_memguard.audit.attribute_probe import (
    attribute_shares,
    measure_attributes,
    prepare_attributes,
    read_attributes,
)
from sd_memguard.audit.collection import read_folder
from sd_memguard.audit.features.cache import Store
from sd_memguard.audit.features.extractors import Bundled
from sd_memguard.audit.metrics.attributes import train_classifier
from sd_memguard.audit.metrics.background import Gallery
from sd_memguard.audit.metrics.measures import GeneratedSet

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60)}


def write_folder(folder, shades, *, extra=0):
    """Write squares whose upper colour the caption names and whose lower colour it leaves open."""
    folder.mkdir()
    rows = []
    for upper in COLOURS:
        for lower in COLOURS:
            for shade in shades:
                name = f"{upper}-{lower}-{shade}.png"
                image = Image.new("RGB", (64, 64), tuple(value + shade for value in COLOURS[upper]))
                image.paste(tuple(value + shade + extra for value in COLOURS[lower]), (0, 32, 64, 64))
                image.save(folder / name)
                rows.append({"file_name": name, "text": upper, "named": {"upper": upper}, "open": {"lower": lower}})
    for file in ("metadata.jsonl", "attributes.jsonl"):
        (folder / file).write_text("\n".join(json.dumps(row) for row in rows))
    return read_folder(folder, "--train_data_dir")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(attribute_probe, "user_cache_folder", lambda: tmp_path / "user")


def make_gallery(train, store):
    return Gallery(train, Bundled(None, torch.device("cpu")), Store(store), torch.device("cpu"), 16)


def test_a_copying_model_agrees_in_what_captions_leave_open(tmp_path, monkeypatch):
    train = write_folder(tmp_path / "train", range(0, 24, 2))
    held_out = write_folder(tmp_path / "heldout", range(1, 5))
    gallery = make_gallery(train, tmp_path / "cache")
    monkeypatch.setattr(attribute_probe, "train_classifier", partial(train_classifier, num_steps=40))
    probe = prepare_attributes(gallery, held_out, None, 0)
    assert probe.caption_accuracy == 1
    images = write_folder(tmp_path / "copies", range(0, 24, 2), extra=1)
    copies = GeneratedSet(images, ["unique"] * 48, 1, [], train, range(48))
    found = attribute_shares(measure_attributes(probe, copies, gallery), copies, "unique", 0)
    assert found.caption_accuracy.value == found.open_agreement.value == 1
    assert found.chance_agreement.value == pytest.approx(0.5)
    # A held-out image is not among those that tell what its own prompt gives by chance.
    new = GeneratedSet(held_out, ["heldout"] * 16, 1, [], held_out, range(16))
    found = attribute_shares(measure_attributes(probe, new, gallery), new, "heldout", 0)
    assert found.open_agreement.value == 1
    assert found.chance_agreement.value == pytest.approx(3 / 7)
    given = GeneratedSet(copies.images, ["given"] * 48, 1)
    assert measure_attributes(probe, given, gallery) == "images were given, whose captions are not known"


def test_the_classifier_is_kept_for_the_same_images_and_attributes_alone(tmp_path, monkeypatch):
    write_folder(tmp_path / "train", range(0, 24, 2))
    trained = []

    def count(images, labels, **settings):
        trained.append(len(images))
        return train_classifier(images, labels, num_steps=2, **settings)

    monkeypatch.setattr(attribute_probe, "train_classifier", count)

    def prepare(folder, seed=0):
        train = read_folder(tmp_path / "train", "--train_data_dir")
        return prepare_attributes(make_gallery(train, tmp_path / folder), None, None, seed).classifier

    first = prepare("one").state_dict()
    again = prepare("another").state_dict()
    assert trained == [48]
    assert all(torch.equal(first[name], again[name]) for name in first)
    prepare("one", seed=1)
    assert len(trained) == 2
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "train" / "red-red-0.png")
    prepare("one")
    assert len(trained) == 3
    file = tmp_path / "train" / "attributes.jsonl"
    file.write_text(file.read_text().replace('"lower": "red"', '"lower": "green"', 1))
    prepare("one")
    assert len(trained) == 4
    for kept in (tmp_path / "user" / "classifiers" / "files").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])
    prepare("one")
    prepare("one")
    assert len(trained) == 5


def test_a_folder_without_attributes_says_so_and_a_broken_file_is_named(tmp_path):
    train = write_folder(tmp_path / "train", range(2))
    assert read_attributes(train)[0].all == {"upper": "red", "lower": "red"}
    (tmp_path / "train" / "attributes.jsonl").write_text('{"file_name": "red-red-0.png", "attributes": {}}')
    with pytest.raises(AuditError, match=r"attributes.jsonl cannot be used: KeyError\('named'\)"):
        read_attributes(train)
    (tmp_path / "train" / "attributes.jsonl").unlink()
    gallery = make_gallery(train, tmp_path / "cache")
    assert prepare_attributes(gallery, None, None, 0) == "no attributes.jsonl in the folder of the training images"
