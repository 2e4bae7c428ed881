"""What a script's dataset says of its samples: files, captions, near-duplicates."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sd_memguard.files import replace_text
from sd_memguard.plugin.checkpoint import FOLDER
from sd_memguard.plugin.duplicates import find_duplicates

logger = logging.getLogger(__name__)


class BareRecords:
    """What is written in ``memguard/`` without pyarrow: settings, rounds and the summary.

    Args:
        output_dir: of the script.
    """

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)

    def begin(self, record: dict[str, Any]) -> None:
        """Write every setting."""
        replace_text(self.folder / "config.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def write_rounds(self, rounds: Sequence[dict[str, Any]]) -> None:
        """Write a line per round."""
        replace_text(self.folder / "rounds.jsonl", "".join(json.dumps(row) + "\n" for row in rounds))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write how the run ended."""
        replace_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")

    def write_curves(self, rules: Any) -> None:
        """Do nothing."""

    def write_samples(self, table: Any, guard: Any) -> None:
        """Do nothing."""


def sample_table(dataset: Any, arguments: Any, groups: Any) -> Any:
    """Return what the records say of each sample of a script's dataset; None where pyarrow is missing.

    Args:
        dataset: of the script.
        arguments: the script's arguments.
        groups: (N,) int64 tensor of near-duplicates, None where they are not known.
    """
    if find_spec("pyarrow") is None:
        return None
    from sd_memguard.runs.records import SampleTable

    ids = np.arange(len(dataset))
    return SampleTable(
        ids, _files(dataset, arguments), _captions(dataset, arguments), None if groups is None else groups.numpy()
    )


def find_script_duplicates(dataset: Any, *, flip: bool) -> Any:
    """Return the groups of near-duplicates of a dataset, (N,) int64, None where its images are out of reach."""
    images = _images(dataset)
    if images is None:
        return None
    logger.info("looking for near-duplicates among %d images", len(dataset))
    return find_duplicates(images, flip=flip)


def _images(dataset: Any) -> Iterator[Any] | None:
    """Return the images of a dataset, as Pillow has them, before any transform."""
    opened = getattr(dataset, "instance_images", None)
    if isinstance(opened, list) and all(hasattr(image, "convert") for image in opened):
        return (opened[index % len(opened)] for index in range(len(dataset)))
    from PIL import Image

    if hasattr(dataset, "instance_images_path"):  # the DreamBooth scripts' own dataset, which repeats its images
        paths = list(dataset.instance_images_path)
        return (Image.open(paths[index % len(paths)]) for index in range(len(dataset)))
    column = _image_column(dataset)
    if column is None:
        return None
    plain = dataset.with_format(None)
    return (plain[index][column] for index in range(len(dataset)))


def _image_column(dataset: Any) -> str | None:
    features = getattr(dataset, "features", None)
    if not features or find_spec("datasets") is None:
        return None
    import datasets

    return next((name for name, feature in features.items() if isinstance(feature, datasets.Image)), None)


def data_dir(arguments: Any) -> str | None:
    """Return the script's folder of images, where it has one."""
    return getattr(arguments, "train_data_dir", None) or getattr(arguments, "instance_data_dir", None)


def _files(dataset: Any, arguments: Any) -> list[str | None]:
    """Return each sample's file as far as the dataset knows it, relative to the script's data folder."""
    paths: list[Any] = [None] * len(dataset)
    if hasattr(dataset, "instance_images_path"):  # the DreamBooth scripts' own dataset, which repeats its images
        known = list(dataset.instance_images_path)
        paths = [known[index % len(known)] for index in range(len(dataset))]
    elif hasattr(dataset, "cast_column"):
        paths = _huggingface_paths(dataset)
    root = data_dir(arguments)
    if not isinstance(root, str | os.PathLike):  # none, or a list of folders
        return [None if path is None else str(path) for path in paths]
    return [None if path is None else os.path.relpath(path, root) for path in paths]


def _huggingface_paths(dataset: Any) -> list[Any]:
    import datasets

    column = _image_column(dataset)
    if column is None:
        return [None] * len(dataset)
    undecoded = dataset.with_format(None).cast_column(column, datasets.Image(decode=False))
    return [image["path"] for image in undecoded[column]]


def _captions(dataset: Any, arguments: Any) -> list[str | None]:
    """Return each sample's (first) caption."""
    column = getattr(arguments, "caption_column", None)
    if column is not None and column in getattr(dataset, "column_names", []):
        captions = dataset.with_format(None)[column]
        return [c if isinstance(c, str) or c is None else next(iter(c), None) for c in captions]
    given = getattr(dataset, "custom_instance_prompts", None)
    if given:
        return [given[index % len(given)] for index in range(len(dataset))]
    return [getattr(arguments, "instance_prompt", None)] * len(dataset)
