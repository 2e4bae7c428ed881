"""Parts that two images share: local features, and the homography that explains most of their matches.

Registration (``core.verification``) compares whole images. It finds neither a crop to less than half of the area nor a
part that is pasted into another image; local features do, where images are large enough to have them.

1. Describe: SIFT's key points (Lowe 2004) of an image at up to 512 pixels, the clearest first, with the square roots
   of their descriptors (Arandjelovic and Zisserman 2012).
2. Propose: each of the clearest votes for the image that holds its nearest neighbour among all others.
3. Confirm: the points of each proposed pair are matched, by Lowe's ratio of the nearest to the second nearest, and the
   result is the number of matches that one homography explains (RANSAC, Fischler and Bolles 1981).

Ours, not the paper's. Needs OpenCV: the extra `local-features`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sd_memguard.errors import UserError

MAX_SIDE = 512
"""Pixels of the longer edge of an image when it is described."""
NUM_POINTS, NUM_VOTERS = 500, 100
"""Key points that are kept of an image, and those of them that vote."""
NUM_CANDIDATES = 5
"""Images that an image is matched with."""
RATIO = 0.8
"""A match counts where the nearest descriptor is nearer than this share of the second nearest; Lowe's value."""
MAX_ERROR = 4.0
"""Pixels by which a match may miss the homography."""
MIN_MATCHES = 10
"""Fewer explained matches are chance, whatever the set."""
MIN_SCALE, MAX_SCALE, MAX_STRETCH = 0.1, 10.0, 2.0
"""Beyond these an image is not the same: scale, and ratio of the scales in two directions."""

_DIMENSIONS = 128
_POINT_BYTES = _DIMENSIONS + 4  # the descriptor, and two coordinates of 16 bits in eighths of a pixel
ROW_BYTES = NUM_POINTS * _POINT_BYTES
"""Bytes of an image's packed features."""
_MIN_POINTS = 4
_IMAGES_AT_ONCE, _QUERIES_AT_ONCE = 64, 16

Places = npt.NDArray[np.float32]


class LocalFeatures(NamedTuple):
    """Key points of an image, the clearest first.

    Attributes:
        places: (K, 2) float32, right and down, in pixels.
        vectors: (K, D) float32, unit vectors.
    """

    places: Places
    vectors: Tensor


class SharedPart(NamedTuple):
    """For each of Q images the image that it shares most with.

    Attributes:
        num_matches: (Q,) int64, matches that one homography explains; 0 where nothing is shared.
        row: (Q,) int64, the number of that image.
    """

    num_matches: Tensor
    row: Tensor


def opencv() -> Any:
    """Return OpenCV.

    Raises:
        UserError: It is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "local features need OpenCV, which is not installed: pip install 'sd-memguard[local-features]'"
        ) from error
    return cv2


def describe(image: npt.NDArray[np.uint8]) -> Tensor:
    """Return the packed features of an image, (ROW_BYTES,) uint8; zeros where it has fewer points.

    Args:
        image: (H, W, 3) uint8, RGB.

    Raises:
        UserError: OpenCV is not installed.
    """
    cv2 = opencv()
    height, width = image.shape[:2]
    scale = min(1.0, MAX_SIDE / max(height, width))
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    points, descriptors = cv2.SIFT_create(NUM_POINTS).detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)
    row = np.zeros((NUM_POINTS, _POINT_BYTES), np.uint8)
    if points:
        order = np.argsort([-point.response for point in points], kind="stable")[:NUM_POINTS]
        shares = descriptors[order] / np.maximum(descriptors[order].sum(1, keepdims=True), 1e-9)
        row[: len(order), :_DIMENSIONS] = np.round(255 * np.sqrt(shares))
        places = np.array([points[number].pt for number in order])
        row[: len(order), _DIMENSIONS:] = np.round(8 * places).clip(0, 65535).astype("<u2").view(np.uint8)
    return torch.from_numpy(row.reshape(-1))


def unpack(row: Tensor) -> LocalFeatures:
    """Return the features of an image.

    Args:
        row: (ROW_BYTES,) uint8, as ``describe`` returns it.
    """
    points = row.view(NUM_POINTS, _POINT_BYTES)
    points = points[(points[:, :_DIMENSIONS] != 0).any(1)]
    places = np.ascontiguousarray(points[:, _DIMENSIONS:].numpy()).view("<u2").astype(np.float32) / np.float32(8)
    return LocalFeatures(places, _vectors(points[:, :_DIMENSIONS]))


def _vectors(descriptors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(descriptors.float(), dim=-1)


@torch.no_grad()
def find_shared(queries: Tensor, gallery: Sequence[Tensor], *, own: Tensor | None = None) -> SharedPart:
    """Return for each image the image of the gallery that it shares the largest part with.

    The search is exact: an image is compared with all others, some 6 million multiplications each.

    Args:
        queries: (Q, V, ROW_BYTES) uint8, V views of each image: as it is, and flipped where flipped parts count.
        gallery: Blocks (G_i, ROW_BYTES) uint8.
        own: (Q,) rows that are the query itself and do not count; -1 for none.
    """
    count = sum(map(len, gallery))
    matches, rows = torch.zeros(len(queries), dtype=torch.int64), torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        votes = _votes(queries[part], gallery, None if own is None else own[part])
        for number, of_views in enumerate(votes, start):
            for view, counts in zip(queries[number], of_views, strict=True):
                query = unpack(view)
                for row in counts.sort(descending=True, stable=True).indices[: min(NUM_CANDIDATES, count)].tolist():
                    if counts[row] > 0:
                        found = num_matches(query, unpack(gallery[row // len(gallery[0])][row % len(gallery[0])]))
                        if found > matches[number]:
                            matches[number], rows[number] = found, row
    return SharedPart(matches, rows)


def _votes(queries: Tensor, gallery: Sequence[Tensor], own: Tensor | None) -> Tensor:
    """Return how many points of each view have their nearest neighbour in each image, (Q, V, G)."""
    count, views = queries.shape[:2]
    points = queries.view(count, views, NUM_POINTS, _POINT_BYTES)[:, :, :NUM_VOTERS, :_DIMENSIONS]
    voters = _vectors(points.reshape(-1, _DIMENSIONS))
    excluded = None if own is None else own.repeat_interleave(views * NUM_VOTERS)
    best, nearest = torch.zeros(len(voters)), torch.zeros(len(voters), dtype=torch.int64)
    first = 0
    for block in gallery:
        for part in block.split(_IMAGES_AT_ONCE):
            known = _vectors(part.view(len(part), NUM_POINTS, _POINT_BYTES)[:, :, :_DIMENSIONS].flatten(0, 1))
            alike = (voters @ known.T).view(len(voters), len(part), NUM_POINTS).amax(2)
            if excluded is not None:
                alike[torch.arange(first, first + len(part)) == excluded[:, None]] = -1.0
            value, row = alike.max(1)
            nearest = torch.where(value > best, row + first, nearest)
            best = torch.maximum(best, value)
            first += len(part)
    votes = torch.zeros(count * views, first)
    # A point without a descriptor is like none.
    votes.scatter_add_(1, nearest.view(count * views, -1), (best > 0).float().view(count * views, -1))
    return votes.view(count, views, first)


def num_matches(query: LocalFeatures, source: LocalFeatures) -> int:
    """Return how many matches of two images one homography explains; 0 where none does that keeps the image's shape."""
    if min(len(query.places), len(source.places)) < _MIN_POINTS:
        return 0
    value, index = (query.vectors @ source.vectors.T).topk(2, dim=1)
    squared = (2 - 2 * value).clamp(min=0)
    kept = squared[:, 0] < RATIO**2 * squared[:, 1]
    one, other = query.places[kept.numpy()], source.places[index[kept, 0].numpy()]
    if len(one) < _MIN_POINTS:
        return 0
    cv2 = opencv()
    cv2.setRNGSeed(0)
    transform, inside = cv2.findHomography(one, other, cv2.RANSAC, MAX_ERROR)
    if transform is None:
        return 0
    is_inside = inside.ravel() > 0
    one, other = one[is_inside], other[is_inside]
    if len(one) < _MIN_POINTS or not _keeps_shape(transform, one.mean(0)):
        return 0
    # Points at one place, with several directions, and several points on one, count once.
    return min(len(np.unique(np.round(places / 2), axis=0)) for places in (one, other))


def _keeps_shape(transform: npt.NDArray[np.float64], place: Places) -> bool:
    """Return whether a homography changes the image around a place no more than a copy may be changed."""
    point = np.append(place.astype(np.float64), 1.0)
    divisor = float(transform[2] @ point)
    if abs(divisor) < 1e-9:
        return False
    jacobian = (transform[:2, :2] - np.outer(transform[:2] @ point / divisor, transform[2, :2])) / divisor
    if not np.isfinite(jacobian).all() or np.linalg.det(jacobian) <= 0:
        return False
    large, small = np.linalg.svd(jacobian, compute_uv=False)
    return bool(small > MIN_SCALE and large < MAX_SCALE and large < MAX_STRETCH * small)
