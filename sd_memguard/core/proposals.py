"""Pairs of images that may be one, in near-linear time: trees of random projections (Dasgupta and Freund 2008).

Ours, not the paper's. Each tree sorts the images by a random projection of a coarse copy and splits them in half,
again and again down to leaves of some tens of images. A crop moves a coarse copy little, so that in most trees it stays
in the leaf of its original. The nearest few of each image in its leaves are proposed.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

NUM_TREES = 16
LEAF_SIZE = 32
NUM_PROPOSED = 4
"""Pairs proposed for each image: so many with later images and as many with earlier ones."""
MAX_DISTANCE = 0.9
"""Coarse images farther apart (root mean square over contrast; 1.4: unrelated) are not proposed."""

_PER_LEAF = 3
_MIN_CONTRAST = 4.0  # grey levels, as in core.duplicates
_LEAVES_AT_ONCE = 2048

Pairs = npt.NDArray[np.int64]


def propose_pairs(thumbnails: npt.NDArray[np.uint8], flip: bool) -> Iterator[Pairs]:
    """Yield pairs of positions (P, 2) int64, the smaller first: the nearest of each image, then the next, and so on.

    The result depends on nothing but the thumbnails and their order.

    Args:
        thumbnails: (N, side, side, 3) uint8, RGB; an even side.
        flip: Whether an image is compared with flipped ones too.
    """
    count = len(thumbnails)
    if count < 2:
        return
    coarse = _coarse(thumbnails)
    if flip:
        coarse = np.concatenate([coarse, _coarse(thumbnails[:, :, ::-1])])
    keys, distances = np.empty(0, np.int64), np.empty(0, np.float32)
    for number in range(NUM_TREES):
        found_keys, found = _pairs_of_tree(coarse, count, np.random.default_rng(number))
        keys, first = np.unique(np.concatenate([keys, found_keys]), return_index=True)
        distances = np.concatenate([distances, found])[first]
    pairs = np.stack(np.divmod(keys, count), 1)
    rank = np.minimum(_rank(pairs[:, 0], distances), _rank(pairs[:, 1], distances))
    for wanted in range(NUM_PROPOSED):
        yield pairs[rank == wanted]


def _coarse(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return images at half the side, of mean 0 and contrast 1, (N, D); their distance is a root mean square."""
    side = thumbnails.shape[1] // 2
    squares = thumbnails.reshape(-1, side, 2, side, 2, 3)
    small: npt.NDArray[np.float32] = squares.mean(axis=(2, 4), dtype=np.float32).reshape(-1, side * side * 3)
    small -= small.mean(1, keepdims=True)
    small /= np.maximum(np.sqrt(np.square(small).mean(1, keepdims=True)), _MIN_CONTRAST)
    small /= np.float32(np.sqrt(small.shape[1]))
    return small


def _pairs_of_tree(
    coarse: npt.NDArray[np.float32], count: int, random: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the near pairs in the leaves of one tree, as ``smaller * count + larger``, and their distances."""
    depth = max(0, int(np.ceil(np.log2(len(coarse) / LEAF_SIZE))))
    num_leaves = 2**depth
    size = -(-len(coarse) // num_leaves)
    order = random.permutation(len(coarse))
    # The tree is full: some images are in it twice, and a pair of one image with itself does not count.
    order = np.concatenate([order, order[: num_leaves * size - len(order)]])
    for level in range(depth):
        one, other = random.integers(len(coarse), size=2)
        direction = coarse[one] - coarse[other] + 1e-3 * random.standard_normal(coarse.shape[1], dtype=np.float32)
        nodes = order.reshape(2**level, -1)
        inside = np.argsort((coarse @ direction)[nodes], axis=1, kind="stable")
        order = np.take_along_axis(nodes, inside, axis=1).reshape(-1)
    keys, distances = [], []
    leaves = order.reshape(num_leaves, size)
    for start in range(0, num_leaves, _LEAVES_AT_ONCE):
        members = leaves[start : start + _LEAVES_AT_ONCE]
        points = coarse[members]
        squares = np.square(points).sum(-1)
        apart = squares[:, :, None] + squares[:, None, :] - 2 * points @ points.transpose(0, 2, 1)
        image = members % count
        apart[image[:, :, None] == image[:, None, :]] = np.inf
        best = np.argpartition(apart, min(_PER_LEAF, size - 1), axis=2)[:, :, :_PER_LEAF]
        near = np.take_along_axis(apart, best, axis=2)
        other_image = np.take_along_axis(np.broadcast_to(image[:, None, :], apart.shape), best, axis=2)
        own_image = np.broadcast_to(image[:, :, None], best.shape)
        kept = near <= MAX_DISTANCE**2
        low, high = np.minimum(own_image, other_image)[kept], np.maximum(own_image, other_image)[kept]
        keys.append(low * count + high)
        distances.append(near[kept])
    return np.concatenate(keys), np.concatenate(distances)


def _rank(images: npt.NDArray[np.int64], distances: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return for each pair how many pairs of the same image are nearer."""
    order = np.lexsort((distances, images))
    first = np.searchsorted(images[order], images[order])
    rank = np.empty(len(images), dtype=np.int64)
    rank[order] = np.arange(len(images)) - first
    return rank
