"""Copied parts: local features of generated and training images, and a decision with its own background."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from sd_memguard.audit.collection import Collection
from sd_memguard.audit.features.cache import digest
from sd_memguard.audit.features.extractors import Extractor
from sd_memguard.audit.metrics.background import Gallery
from sd_memguard.core.local_features import (
    MAX_SIDE,
    MIN_MATCHES,
    NUM_POINTS,
    ROW_BYTES,
    SharedPart,
    describe,
    find_shared,
    num_matches,
    opencv,
    unpack,
)


class LocalPoints(Extractor):
    """The local features of an image, packed: not a descriptor of the whole, but what parts are found by.

    Raises:
        UserError: OpenCV is not installed.
    """

    name = "local features"
    dimensions = ROW_BYTES
    sha256: str | None = None
    is_normalized = False

    def __init__(self) -> None:
        self.preprocessing = f"{NUM_POINTS} SIFT points at up to {MAX_SIDE} pixels, OpenCV {opencv().__version__}"

    def prepare(self, image: PIL.Image.Image) -> Tensor:
        """Return (ROW_BYTES,) uint8."""
        return describe(np.asarray(image))

    def embed(self, batch: Tensor) -> Tensor:
        """Return the batch: the points are found on the CPU."""
        return batch


class PartLimit(NamedTuple):
    """From how many matches on an image is a copy, and what that means for images that nobody copied.

    Attributes:
        num_matches: A copy has so many or more.
        rule: In words, to follow those of the distance.
    """

    num_matches: int
    rule: str


class SharedParts:
    """Finds what generated images share with the training images.

    Args:
        gallery: The training images.
    """

    def __init__(self, gallery: Gallery) -> None:
        self.gallery, self.points = gallery, LocalPoints()
        self.known = gallery.extract(self.points, gallery.train, gallery.train.distinct)

    def find(self, images: Collection) -> SharedPart:
        """Return the training image that every image of another collection shares the largest part with."""
        return self._find(images, range(len(images)), torch.full((len(images),), -1))

    def find_own(self, positions: Tensor) -> SharedPart:
        """Return the *other* distinct training image for the distinct images at these positions."""
        return self._find(self.gallery.train, self.gallery.rows[positions].tolist(), positions)

    def with_own(self, images: Collection, own: Collection, own_rows: Sequence[int]) -> Tensor:
        """Return the matches of every image with one image of a collection each, (N,) int64."""
        views, others = self._views(images, range(len(images))), self.gallery.extract(self.points, own, own_rows)

        def compute(rows: range) -> Tensor:
            sources = torch.cat(others)[rows.start : rows.stop]
            return torch.tensor(
                [
                    [max(num_matches(unpack(view), unpack(source)) for view in views[row])]
                    for row, source in zip(rows, sources, strict=True)
                ]
            )

        keys = [f"{key} {own.hashes[row]}" for key, row in zip(images.hashes, own_rows, strict=True)]
        return self.gallery.store.rows(f"matches with its own by {self.points.key}", keys, compute)[:, 0]

    def _views(self, images: Collection, rows: Sequence[int]) -> Tensor:
        """Return the packed features of images and of the flipped images, (N, 2, ROW_BYTES)."""
        views = [self.gallery.extract(self.points, images, rows, flipped=flipped) for flipped in (False, True)]
        return torch.stack([torch.cat(view) for view in views], 1)

    def _find(self, images: Collection, chosen: Sequence[int], own: Tensor) -> SharedPart:
        views, is_own = self._views(images, chosen), bool((own >= 0).any())

        def compute(rows: range) -> Tensor:
            part = slice(rows.start, rows.stop)
            return torch.stack(find_shared(views[part], self.known, own=own[part] if is_own else None), 1)

        kind = f"part shared with {'others of ' if is_own else ''}{digest(self.points.key, self.gallery.key)}"
        found = self.gallery.store.rows(kind, [images.hashes[row] for row in chosen], compute)
        return SharedPart(found[:, 0], self.gallery.rows[found[:, 1]])


def choose_num_matches(background: Tensor, false_positive_rate: float) -> PartLimit:
    """Return so many matches that at most this share of a background has as many.

    Args:
        background: (N,) matches of images that nobody copied.
        false_positive_rate: Between 0 and 1.
    """
    ordered = background.sort(descending=True).values
    allowed = int(false_positive_rate * len(ordered) + 1e-9)
    limit = max(MIN_MATCHES, int(ordered[allowed]) + 1) if allowed < len(ordered) else MIN_MATCHES
    share = (background >= limit).double().mean().item()
    return PartLimit(limit, f"or with {limit} or more matches of local features, which {share:.1%} of them have")
