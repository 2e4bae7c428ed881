"""The attributes of an audit's images: read, learned from real images, and found in generated ones."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_memguard.audit import AuditError
from sd_memguard.audit.collection import Collection, read_folder
from sd_memguard.audit.features.cache import Store, digest
from sd_memguard.audit.features.extractors import Thumbnails
from sd_memguard.audit.metrics.attributes import (
    NUM_STEPS,
    AttributeClassifier,
    AttributeFigures,
    Values,
    accuracy,
    attribute_figures,
    train_classifier,
)
from sd_memguard.audit.metrics.background import Gallery
from sd_memguard.audit.metrics.measures import GeneratedSet
from sd_memguard.audit.metrics.statistics import Estimate, bootstrap, mean
from sd_memguard.audit.metrics.verified import as_images
from sd_memguard.audit.report import AttributeShares, Classifier
from sd_memguard.core.seeding import generator_for
from sd_memguard.files import user_cache_folder

FILE = "attributes.jsonl"
MAX_IMAGES = 10_000
"""Most real images of each folder that the classifier learns from."""


class Attributes(NamedTuple):
    """What is known of one image: what its caption names, and what it shows beyond."""

    named: Values
    open: Values

    @property
    def all(self) -> dict[str, str]:
        """Both together."""
        return {**self.named, **self.open}


class AttributeProbe(NamedTuple):
    """What generated images are judged by.

    Attributes:
        classifier: Of the attributes.
        known: Attributes of each row of the training and held-out images by the collection's place, None where unknown.
        held_out: Everything that the held-out images show, by their row.
        caption_accuracy: Of the held-out images themselves; None without them.
    """

    classifier: AttributeClassifier
    known: Mapping[str, Sequence[Attributes | None]]
    held_out: Mapping[int, Values]
    caption_accuracy: float | None

    def describe(self) -> Classifier:
        """Return what the report says of it."""
        return Classifier(dict(self.classifier.accuracy), self.caption_accuracy)


def prepare_attributes(
    gallery: Gallery, reference: Collection | None, attributes_dir: str | None, seed: int
) -> AttributeProbe | str:
    """Return what generated images are judged by, or the reason in words why they are not.

    Args:
        gallery: The training images.
        reference: Images not trained on.
        attributes_dir: A folder of further real images, from which the classifier learns as well.
        seed: Of the classifier's training.

    Raises:
        AuditError: ``attributes.jsonl`` cannot be read.
    """
    train = gallery.train
    if read_attributes(train) is None:
        return f"no {FILE} in the folder of the training images"
    further = (
        None if attributes_dir is None else read_folder(Path(attributes_dir), "--attributes_dir", needs_captions=False)
    )
    images: list[Tensor] = []
    labels: list[Values] = []
    keys: list[str] = []
    known: dict[str, Sequence[Attributes | None]] = {}
    held_out: dict[int, Attributes] = {}
    held_out_images = torch.zeros(0)
    for collection in (train, reference, further):
        found = None if collection is None else read_attributes(collection)
        if collection is None or found is None:
            continue
        shown = {row: one for row in collection.distinct if (one := found[row]) is not None}
        rows = list(shown)[:MAX_IMAGES]
        images.append(as_images(torch.cat(gallery.extract(Thumbnails(), collection, rows))))
        labels += [shown[row].all for row in rows]
        keys += [collection.hashes[row] for row in rows]
        if collection is not further:
            known[collection.place] = found
        if collection is reference:
            held_out, held_out_images = {row: shown[row] for row in rows}, images[-1]
    try:
        classifier = _kept_classifier(torch.cat(images), labels, keys, seed)
    except AuditError as error:
        return str(error)
    ceiling = None
    if held_out:
        right = accuracy(classifier, held_out_images, [one.named for one in held_out.values()])
        ceiling = None if right.isnan().all() else float(right.nanmean())
    return AttributeProbe(classifier, known, {row: one.all for row, one in held_out.items()}, ceiling)


def _kept_classifier(images: Tensor, labels: Sequence[Values], keys: Sequence[str], seed: int) -> AttributeClassifier:
    """Return the classifier of these images and labels from the user's cache, trained where it is not there yet."""
    recipe = ("attribute classifier 1", torch.__version__, seed, NUM_STEPS)
    key = digest(*recipe, json.dumps(labels, sort_keys=True), *keys)
    store = Store(user_cache_folder() / "classifiers")
    try:
        return _read_classifier(store.file(key))
    except (OSError, SafetensorError, KeyError, ValueError):  # not there, or damaged
        classifier = train_classifier(images, labels, seed=seed)
        about = {"values": json.dumps(classifier.values), "accuracy": json.dumps(classifier.accuracy)}
        store.keep_file(key, partial(save_file, classifier.state_dict(), metadata=about))
        return _read_classifier(store.file(key))


def _read_classifier(file: Path) -> AttributeClassifier:
    with safe_open(file, "pt") as stored:
        about = stored.metadata()
    classifier = AttributeClassifier(json.loads(about["values"])).eval()
    classifier.load_state_dict(load_file(file))
    classifier.accuracy = json.loads(about["accuracy"])
    return classifier


def read_attributes(images: Collection) -> list[Attributes | None] | None:
    """Return the attributes of each image of a folder, None for an image without; None where the folder has none.

    Raises:
        AuditError: ``attributes.jsonl`` is no file of JSON objects with ``file_name``, ``named`` and ``open``.
    """
    file = Path(images.place) / FILE
    if not images.is_folder or not file.is_file():
        return None
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        found = {
            row["file_name"]: Attributes(
                *({str(name): str(value) for name, value in row[part].items()} for part in ("named", "open"))
            )
            for row in rows
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AuditError(
            f"{file} cannot be used: {error!r}; each line must be an object with `file_name`, and `named` and `open` "
            "with attributes and their values, e.g. {'named': {'hair': 'long'}, 'open': {'eyes': 'blue'}}"
        ) from error
    return [found.get(name) for name in images.files]


def measure_attributes(probe: AttributeProbe, audited: GeneratedSet, gallery: Gallery) -> AttributeFigures | str:
    """Return the figures of each generated image, or the reason in words why there are none."""
    if audited.own is None:
        return "images were given, whose captions are not known"
    known = probe.known.get(audited.own.place)
    if known is None:
        return f"no {FILE} in {audited.own.place}"
    own = [known[row] or Attributes({}, {}) for row in audited.own_rows]
    images = as_images(torch.cat(gallery.extract(Thumbnails(), audited.images, range(len(audited.images)))))
    itself = None
    if audited.own is not gallery.train:
        position = {row: number for number, row in enumerate(probe.held_out)}
        itself = [position.get(row) for row in audited.own_rows]
    return attribute_figures(
        probe.classifier,
        images,
        [one.named for one in own],
        [one.open for one in own],
        list(probe.held_out.values()),
        itself,
    )


def attribute_shares(found: AttributeFigures, audited: GeneratedSet, kind: str, seed: int) -> AttributeShares:
    """Return the figures of a kind's images as shares with intervals over captions."""
    estimates: dict[str, Estimate | None] = {}
    for name, values in found._asdict().items():
        shaped = audited.by_caption(values, kind)
        shaped = shaped[~shaped.isnan().any(1)]
        generator = generator_for(seed, f"bootstrap {name}")
        estimates[name] = bootstrap(shaped, mean, generator) if len(shaped) else None
    return AttributeShares(**estimates)
