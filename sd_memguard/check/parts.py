"""Images that share a part: strong crops, and one image pasted into another."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageOps
from tqdm.auto import tqdm

from sd_memguard.core.local_features import describe, find_shared, opencv
from sd_memguard.data.image_check import ImageError, decode_image
from sd_memguard.data.rows import Source
from sd_memguard.errors import UserError

MAX_IMAGES = 5000
"""Every image is compared with every other."""

NUM_MATCHES = 20
"""Two images share a part from so many matches on: of the photographs of docs/audit.md that nobody copied, the two most
alike, of one tower, had 15."""


class SharedImages(NamedTuple):
    """Two rows whose images share a part.

    Attributes:
        rows: Ascending.
        num_matches: Of local features.
    """

    rows: tuple[int, int]
    num_matches: int


def check_number(count: int) -> None:
    """Refuse what cannot be searched for parts, before any image is decoded.

    Raises:
        UserError: There are too many images, or OpenCV is not installed.
    """
    if count > MAX_IMAGES:
        raise UserError(
            f"`--local_features` compares every image with every other, which takes at most {MAX_IMAGES:,} images, got "
            f"{count:,}; check a part of them"
        )
    opencv()


def find_parts(source: Source, rows: Sequence[int], *, flip: bool, progress: bool) -> list[SharedImages]:
    """Return the pairs of images that share a part, those with most matches first.

    Args:
        source: Of the images.
        rows: Of images that decode, one of each group of duplicates.
        flip: Whether a flipped part is shared.
        progress: Show a progress bar.
    """
    known, views = [], []
    for row in tqdm(rows, desc="Describing images", unit="image", leave=False, disable=not progress):
        try:
            image = decode_image(source.images.read(row))
        except (ImageError, OSError):  # removed since it was checked
            continue
        both = [describe(np.asarray(one)) for one in (image, *([ImageOps.mirror(image)] if flip else []))]
        known.append(row)
        views.append(torch.stack(both))
    if len(known) < 2:
        return []
    found = find_shared(torch.stack(views), [torch.stack(views)[:, 0]], own=torch.arange(len(known)))
    pairs: dict[tuple[int, int], int] = {}
    for row, other, count in zip(known, found.row.tolist(), found.num_matches.tolist(), strict=True):
        if count >= NUM_MATCHES:
            pair = min(row, known[other]), max(row, known[other])
            pairs[pair] = max(count, pairs.get(pair, 0))
    return [SharedImages(*one) for one in sorted(pairs.items(), key=lambda one: (-one[1], one[0]))]
