"""The attributes of an audit's images: read, learned from real images, and found in generated ones."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd_memguard.audit import AuditError
from sd_memguard.audit.collection import Collection, read_folder
from sd_memguard.audit.features.cache import digest
from sd_memguard.audit.features.extractors import Thumbnails
from sd_memguard.audit.metrics.attributes import (
    NUM_STEPS,
    AttributeClassifier,
    Values,
    attribute_figures,
    train_classifier,
)
from sd_memguard.audit.metrics.background import Gallery
from sd_memguard.audit.metrics.measures import GeneratedSet
from sd_memguard.audit.metrics.statistics import bootstrap, mean
from sd_memguard.audit.metrics.verified import as_images
from sd_memguard.core.seeding import generator_for

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
        train: Attributes of each training image by its row, None where unknown.
        held_out: Everything that the images not trained on show.
    """

    classifier: AttributeClassifier
    train: Sequence[Attributes | None]
    held_out: Sequence[Values]


def prepare_attributes(
    gallery: Gallery, reference: Collection | None, attributes_dir: Path | None, seed: int
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
    known = read_attributes(train)
    if known is None:
        return f"no {FILE} in the folder of the training images"
    further = None if attributes_dir is None else read_folder(attributes_dir, "--attributes_dir", needs_captions=False)
    images, labels, keys = [], [], []
    heldout: list[Values] = []
    for collection in (train, reference, further):
        found = None if collection is None else read_attributes(collection)
        if collection is None or found is None:
            continue
        rows = [row for row in collection.distinct if found[row] is not None][:MAX_IMAGES]
        here = [one.all for row in rows if (one := found[row]) is not None]
        images.append(as_images(torch.cat(gallery.extract(Thumbnails(), collection, rows))))
        labels += here
        keys += [collection.hashes[row] for row in rows]
        heldout += here if collection is reference else []
    try:
        classifier = _kept_classifier(gallery, torch.cat(images), labels, keys, seed)
    except AuditError as error:
        return str(error)
    return AttributeProbe(classifier, known, heldout)


def _kept_classifier(
    gallery: Gallery, images: torch.Tensor, labels: Sequence[Values], keys: Sequence[str], seed: int
) -> AttributeClassifier:
    key = digest("attribute classifier", seed, NUM_STEPS, json.dumps(labels, sort_keys=True), *keys)
    if not gallery.store.has_file(key):
        classifier = train_classifier(images, labels, seed=seed)
        about = {"values": json.dumps(classifier.values), "accuracy": json.dumps(classifier.accuracy)}
        gallery.store.keep_file(key, partial(save_file, classifier.state_dict(), metadata=about))
    with safe_open(gallery.store.file(key), "pt") as stored:
        about = stored.metadata()
    classifier = AttributeClassifier(json.loads(about["values"])).eval()
    classifier.load_state_dict(load_file(gallery.store.file(key)))
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


def measure_attributes(
    probe: AttributeProbe, audited: GeneratedSet, gallery: Gallery, seed: int
) -> dict[str, Any] | str:
    """Return the figures of a model's generated images, or the reason in words why there are none."""
    if not audited.own_rows:
        return "images were given, whose captions are not known"
    own = [probe.train[row] or Attributes({}, {}) for row in audited.own_rows]
    images = as_images(torch.cat(gallery.extract(Thumbnails(), audited.images, range(len(audited.images)))))
    found = attribute_figures(
        probe.classifier, images, [one.named for one in own], [one.open for one in own], probe.held_out
    )
    estimates: dict[str, Any] = {}
    for name, values in found._asdict().items():
        by_caption = values.unflatten(0, (-1, audited.per_caption))
        by_caption = by_caption[~by_caption.isnan().any(1)]
        generator = generator_for(seed, f"bootstrap {name}")
        estimates[name] = bootstrap(by_caption, mean, generator) if len(by_caption) else None
    return {**estimates, "classifier_accuracy": probe.classifier.accuracy}
