"""What a script's dataset says of its samples: files, captions, near-duplicates."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from sd_memguard.plugin.duplicates import find_duplicates
from sd_memguard.runs.records import SampleTable

logger = logging.getLogger(__name__)


def sample_table(dataset: Any, arguments: Any, groups: Any) -> SampleTable:
    """Return what the records say of each sample of a script's dataset.

    Args:
        dataset: of the script.
        arguments: the script's arguments.
        groups: (N,) int64 tensor of near-duplicates, None where they are not known.
    """
    ids = np.arange(len(dataset))
    return SampleTable(
        ids, _files(dataset, arguments), _captions(dataset, arguments), None if groups is None else groups.numpy()
    )


def find_script_duplicates(dataset: Any) -> Any:
    """Return the groups of near-duplicates of a script's dataset, (N,) int64, None where its images are out of reach."""
    images = _images(dataset)
    if images is None:
        return None
    logger.info("looking for near-duplicates among %d images", len(dataset))
    return find_duplicates(images)


def _images(dataset: Any) -> Iterator[Image.Image] | None:
    """Return the images of a dataset as they are before any transform."""
    if hasattr(dataset, "instance_images_path"):  # the DreamBooth scripts' own dataset, which repeats its images
        paths = list(dataset.instance_images_path)
        return (Image.open(paths[index % len(paths)]) for index in range(len(dataset)))
    column = _image_column(dataset)
    if column is None:
        return None
    plain = dataset.with_format(None)
    return (plain[index][column] for index in range(len(dataset)))


def _image_column(dataset: Any) -> str | None:
    import datasets

    features = getattr(dataset, "features", None) or {}
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
    return [getattr(arguments, "instance_prompt", None)] * len(dataset)
