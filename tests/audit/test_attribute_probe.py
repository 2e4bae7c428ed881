"""Attributes of coloured squares, from folders to figures."""

import json
from functools import partial

import pytest
import torch
from PIL import Image

from sd_memguard.audit import AuditError, attribute_probe
from sd_memguard.audit.attribute_probe import measure_attributes, prepare_attributes, read_attributes
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


def test_a_copying_model_agrees_in_what_captions_leave_open(tmp_path, monkeypatch):
    train = write_folder(tmp_path / "train", range(0, 24, 2))
    held_out = write_folder(tmp_path / "heldout", range(1, 5))
    store = Store(tmp_path / "cache")
    gallery = Gallery(train, Bundled(None, torch.device("cpu")), store, torch.device("cpu"), 16)
    monkeypatch.setattr(attribute_probe, "train_classifier", partial(train_classifier, num_steps=40))
    probe = prepare_attributes(gallery, held_out, None, 0)
    copies = GeneratedSet(
        write_folder(tmp_path / "copies", range(0, 24, 2), extra=1), ["unique"] * 48, 1, [], range(48)
    )
    found = measure_attributes(probe, copies, gallery, 0)
    assert found["caption_accuracy"].value == found["open_agreement"].value == 1
    assert found["chance_agreement"].value == pytest.approx(0.5)
    monkeypatch.setattr(attribute_probe, "train_classifier", lambda *_, **__: pytest.fail("trained again"))
    again = prepare_attributes(gallery, held_out, None, 0)
    assert measure_attributes(again, copies, gallery, 0) == found
    given = GeneratedSet(copies.images, ["given"] * 48, 1, [], [])
    assert measure_attributes(probe, given, gallery, 0) == "images were given, whose captions are not known"


def test_a_folder_without_attributes_says_so_and_a_broken_file_is_named(tmp_path):
    train = write_folder(tmp_path / "train", range(2))
    assert read_attributes(train)[0].all == {"upper": "red", "lower": "red"}
    (tmp_path / "train" / "attributes.jsonl").write_text('{"file_name": "red-red-0.png", "attributes": {}}')
    with pytest.raises(AuditError, match=r"attributes.jsonl cannot be used: KeyError\('named'\)"):
        read_attributes(train)
    (tmp_path / "train" / "attributes.jsonl").unlink()
    gallery = Gallery(train, Bundled(None, torch.device("cpu")), Store(tmp_path / "c"), torch.device("cpu"), 16)
    assert prepare_attributes(gallery, None, None, 0) == "no attributes.jsonl in the folder of the training images"
