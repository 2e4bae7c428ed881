"""What earlier checks have found out about good images, so that the same files need not be decoded again.

Rows are found by the hash of a file's content: names may change. A bad image is never kept; it is looked at again
each time, and its fault told again.
"""

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError

from sd_memguard.core.duplicates import THUMBNAIL_SIDE
from sd_memguard.data.encoding_store import KEY, MISSING, EncodingStore
from sd_memguard.errors import UserError

VERSIONED = ("datasets", "pillow")
"""Libraries that decide what an image is once it is decoded."""
_SIZE_BYTES = 8


class CheckCacheError(UserError):
    """What was found out about the images cannot be kept."""


class GoodImage(NamedTuple):
    """A good image: width and height after EXIF rotation, and its thumbnail where these are kept."""

    size: tuple[int, int]
    thumbnail: npt.NDArray[np.uint8] | None


class CheckCache:
    """Good images by the hash of their files; threads may use it at once.

    Args:
        folder: where the rows lie, in a sub-folder of their own.
        thumbnails: keep (THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3) of each image too, for the search for duplicates.

    Raises:
        CheckCacheError: the folder cannot be written or is full; so do ``add`` and ``flush``.
    """

    def __init__(self, folder: Path, *, thumbnails: bool) -> None:
        self._thumbnail = (THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3) if thumbnails else None
        row_bytes = _SIZE_BYTES + (int(np.prod(self._thumbnail)) if self._thumbnail else 0)
        versions = {name: importlib.metadata.version(name) for name in VERSIONED}
        with _named_faults(folder):
            self._store = EncodingStore(folder, "checks", versions, (row_bytes,), torch.uint8)
        self._folder = folder
        self._adding = Lock()

    def find(self, key: bytes) -> GoodImage | None:
        """Return what is known of the image with this hash, None where it was not seen yet."""
        place = self._store.find(np.array([key], KEY))
        if place[0] == MISSING:
            return None
        row = self._store.read(place)[0].numpy()
        width, height = row[:_SIZE_BYTES].view(np.int32).tolist()
        return GoodImage(
            (width, height), None if self._thumbnail is None else row[_SIZE_BYTES:].reshape(self._thumbnail)
        )

    def add(self, key: bytes, seen: GoodImage) -> None:
        """Take in a good image, to be found after the next ``flush``."""
        size = np.array(seen.size, np.int32).view(np.uint8)
        row = size if seen.thumbnail is None else np.concatenate((size, seen.thumbnail.reshape(-1)))
        with self._adding, _named_faults(self._folder):
            self._store.add([key], torch.from_numpy(row)[None])

    def flush(self) -> None:
        """Write what was added."""
        with _named_faults(self._folder):
            self._store.flush()


@contextmanager
def _named_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckCacheError(
            f"what the check of the images finds cannot be kept in {folder}: {error}; make room there, or name "
            "another folder by `--encoding_cache_dir`"
        ) from error
