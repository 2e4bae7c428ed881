"""Near-duplicates of a dataset that is at hand as images, for loops and scripts of one's own."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sd_memguard.core.duplicates import THUMBNAIL_SIDE, find_groups, make_thumbnail


def find_duplicates(images: Iterable[Any], *, flip: bool = False) -> Tensor:
    """Return for each image the number of the first one of its group of near-duplicates, (N,) int64.

    An image without near-duplicates gets its own number. It is what the drop-in finds: equal images,
    recompressed, resized and recolored ones, crops of up to about 7% of each side, and flips where asked. Near-linear
    in N. Give the result to the guard as ``groups``.

    Args:
        images: N Pillow images in any mode, one at a time; a generator that opens files will do.
        flip: Whether flipped images count as near-duplicates.

    >>> from PIL import Image
    >>> down, right = (Image.linear_gradient("L").rotate(angle) for angle in (0, 90))
    >>> find_duplicates([down, right, down.resize((64, 64))]).tolist()
    [0, 1, 0]
    """
    thumbnails = [make_thumbnail(image) for image in images]
    shape = (0, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)
    stacked = np.stack(thumbnails) if thumbnails else np.empty(shape, dtype=np.uint8)
    return torch.from_numpy(find_groups(stacked, flip=flip))
