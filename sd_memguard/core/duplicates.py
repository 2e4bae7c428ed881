"""Near-identical images, found in near-linear time: hashes and trees propose pairs, thumbnails confirm them.

Ours, not the paper's. First the easy ones: recompressed, resized, slightly cropped. A perceptual hash is a row of signs
of low frequencies, so that two versions of one image differ in few bits. The hashes are sorted under 28 orders of
their bits, one for each two of their eight bytes in front: two hashes that differ in six bits at most agree in two
bytes at least, and so lie near each other in one of the orders (the sorted tables of Manku et al. 2007, "Detecting
near-duplicates for web crawling"). Equal hashes are sorted by a random projection of the thumbnail, another one in
each order. Each image is compared with the next few in each order, and with no more once it was unlike 64 others: so
the time is bounded also where all hashes are alike.

Then crops of up to some 7% of a side and, where asked, flips: trees of random projections (``core.proposals``) propose
the few nearest images of each, and registration (``core.verification``) decides.
"""

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sd_memguard.core.proposals import propose_pairs
from sd_memguard.core.verification import verify_pairs

THUMBNAIL_SIDE = 36
"""Side of a thumbnail in pixels; of 24, 32, 36, 64 the smallest that registration tells images apart at."""
SMALL_SIDE = 12
"""Side at which the easy ones are compared; of 8, 12, 16, 24 the smallest that tells apart as well as larger ones."""
MAX_REGISTERED_DISTANCE = 0.025
"""Registered images no farther apart than this are one: crops of 7% are below .02, other faces of one style above."""
MAX_DISTANCE = 0.12
"""Thumbnails no farther apart than this are of one image; measured, see docs/method.md."""
MAX_BITS = 10
"""Hashes that differ in more bits are not looked at."""
WINDOW = 16
"""Neighbours in each order with which an image is compared."""
MAX_FAILURES = 64
"""Comparisons in vain after which an image is left alone."""

_MAX_MEMBER_DISTANCE = 0.05  # a member of a group that joins another may be a rougher version
_MIN_CONTRAST = 4.0  # grey levels; below that an image counts as flat and its noise is not blown up
_MAX_BRIGHTER = 32.0  # grey levels by which one of two images of the same pattern may be brighter
_MIN_COEFFICIENT = 2.0  # grey levels; a frequency as weak as this is noise, whatever its sign
_MAX_SHIFT = 0.6  # pixels of the thumbnail, 5 % of its side: what a crop may shift, and stretch each half
_MAX_DISTANCE_BEFORE_SHIFT = 0.4  # a crop of 4 % moves images hardly farther apart
_BILINEAR = 2  # PIL.Image.Resampling.BILINEAR: this module asks for Pillow of nobody who brings no images
_ROWS_PER_CHUNK = 4096
_ORDERS = [[*front, *(byte for byte in range(8) if byte not in front)] for front in combinations(range(8), 2)]

Thumbnails = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def find_groups(thumbnails: Thumbnails, *, flip: bool = False) -> Ids:
    """Return for each image the first one of its group, (N,) int64; its own number where it is single.

    Every member of a group was compared with the first one, so a chain of images each like the next is not one group.
    The result depends on nothing but the thumbnails and their order.

    Args:
        thumbnails: (N, side, side, 3) uint8, RGB.
        flip: Whether flipped images are of one group.
    """
    first_equal = _first_equal(thumbnails)
    distinct = np.flatnonzero(first_equal == np.arange(len(thumbnails)))
    leaders = _Leaders(thumbnails, distinct)
    for number in range(len(_ORDERS)):
        leaders.merge_neighbours(number)
    leaders.merge_registered(flip)
    position = np.searchsorted(distinct, first_equal)
    return distinct[leaders.leader_of[position]]


def make_thumbnail(image: Any) -> Thumbnails:
    """Return a Pillow image squeezed to a small square, (side, side, 3) uint8, RGB."""
    squeezed = image.convert("RGB").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), _BILINEAR, reducing_gap=3.0)
    return np.asarray(squeezed)


def keep_rows(thumbnails: Thumbnails, rows: Ids) -> Thumbnails:
    """Return these rows, which ascend, moved to the front of the same array: a million thumbnails are 4 GB."""
    for part in _chunks(len(rows)):
        kept = thumbnails[rows[part]]
        thumbnails[part.start : part.start + len(kept)] = kept
    return thumbnails[: len(rows)]


def shrink(thumbnails: Thumbnails) -> Thumbnails:
    """Return thumbnails at ``SMALL_SIDE``, means over squares of pixels."""
    step = thumbnails.shape[1] // SMALL_SIDE
    small = np.empty((len(thumbnails), SMALL_SIDE, SMALL_SIDE, 3), dtype=np.uint8)
    for rows in _chunks(len(thumbnails)):
        squares = thumbnails[rows].reshape(-1, SMALL_SIDE, step, SMALL_SIDE, step, 3)
        small[rows] = np.round(squares.mean(axis=(2, 4), dtype=np.float32))
    return small


def hash_thumbnails(thumbnails: Thumbnails) -> npt.NDArray[np.uint8]:
    """Return the perceptual hashes, (N, 8) uint8: which of the 8 x 8 lowest frequencies of the grey image are large.

    A bit is set where the coefficient of the cosine transform lies above the median of all 64 by more than noise.
    """
    side = thumbnails.shape[1]
    frequency, pixel = np.meshgrid(np.arange(8), np.arange(side), indexing="ij")
    basis = np.sqrt(2 / side) * np.cos(np.pi * frequency * (2 * pixel + 1) / (2 * side))
    low_first = np.argsort(np.add.outer(np.arange(8), np.arange(8)).ravel(), kind="stable")
    hashes = np.empty((len(thumbnails), 8), dtype=np.uint8)
    for rows in _chunks(len(thumbnails)):
        grey = thumbnails[rows].astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        coefficients = (basis @ grey @ basis.T).reshape(len(grey), 64)[:, low_first]
        median = np.median(coefficients, axis=1, keepdims=True)
        hashes[rows] = np.packbits(coefficients > median + _MIN_COEFFICIENT, axis=1)
    return hashes


def distances(first: Thumbnails, second: Thumbnails) -> npt.NDArray[np.float32]:
    """Return how far thumbnails are apart, pair by pair, (N,) float32.

    The root mean square difference of the pixels, each image's mean subtracted and its contrast divided out, after
    the small shift and stretch that fit best: 0 for the same pattern, also darker, brighter or of another contrast;
    about 1.4 for unrelated ones. Infinite where one is much brighter than the other.

    Args:
        first: (N, side, side, 3) uint8.
        second: as many.
    """
    (one, mean), (other, other_mean) = _standardized(first), _standardized(second)
    difference = other - one
    apart = _root_mean_square(difference)
    apart[np.abs(mean - other_mean) > _MAX_BRIGHTER] = np.inf
    cropped = (apart > MAX_DISTANCE) & (apart < _MAX_DISTANCE_BEFORE_SHIFT)
    apart[cropped] = np.minimum(
        apart[cropped], _aligned(difference[cropped], one[cropped] + np.float32(0.5) * difference[cropped])
    )
    return apart


def _aligned(difference: Pixels, mean: Pixels) -> npt.NDArray[np.float32]:
    """Return the root mean square of what a shift and stretch leave of the differences, (N,) float32.

    To first order these add multiples of the gradients, and of the gradients times the place, to an image (Lucas and
    Kanade 1981); the multiples are those of least squares. Infinite where they would move a pixel too far.

    Args:
        difference: (N, side, side, 3) of two images.
        mean: (N, side, side, 3) of the same two.
    """
    place = np.linspace(-1, 1, mean.shape[1], dtype=np.float32)
    down, right = np.gradient(mean, axis=(1, 2))
    moves = np.stack((down, right, down * place[:, None, None], right * place[:, None]), axis=-1)
    num_values = math.prod(mean.shape[1:])
    moves = moves.reshape(-1, num_values, 4)
    flat = difference.reshape(-1, num_values, 1)
    # A grain of ridge, for images without gradients in one direction.
    normal = moves.transpose(0, 2, 1) @ moves + 0.05 * np.eye(4, dtype=np.float32)
    shifts = np.linalg.solve(normal, moves.transpose(0, 2, 1) @ flat)
    left = _root_mean_square(flat - moves @ shifts)
    left[(np.abs(shifts) > _MAX_SHIFT).any(axis=(1, 2))] = np.inf
    return left


class _Leaders:
    """Images that lead groups, and who follows whom.

    Args:
        thumbnails: (N, side, side, 3) uint8; not copied.
        rows: (M,) of them, no two equal; images are numbered by their place in here.
    """

    def __init__(self, thumbnails: Thumbnails, rows: Ids) -> None:
        self.full, self.rows = thumbnails, rows
        self.thumbnails = np.empty((len(rows), SMALL_SIDE, SMALL_SIDE, 3), dtype=np.uint8)
        for part in _chunks(len(rows)):
            self.thumbnails[part] = shrink(thumbnails[rows[part]])
        self.hashes = hash_thumbnails(self.thumbnails)
        self.leader_of = np.arange(len(rows))
        self.failures = np.zeros(len(rows), dtype=np.int32)
        self.num_compared = 0

    def merge_neighbours(self, number: int) -> None:
        """Merge groups whose leaders are alike and neighbours in one of the orders."""
        leaders = self._leaders()
        keys = np.ascontiguousarray(self.hashes[leaders][:, _ORDERS[number]]).view(">u8").ravel().astype(np.uint64)
        order = np.lexsort((self._project(leaders, number), keys))
        keys, leaders = keys[order], leaders[order]
        for offset in range(1, min(WINDOW, len(leaders) - 1) + 1):
            near = np.flatnonzero(np.bitwise_count(keys[:-offset] ^ keys[offset:]) <= MAX_BITS)
            one, other = leaders[near], leaders[near + offset]
            both_open = self._is_open(one) & self._is_open(other)
            self._merge(np.minimum(one, other)[both_open], np.maximum(one, other)[both_open])

    def merge_registered(self, flip: bool) -> None:
        """Merge groups whose leaders are one image by registration, the nearest proposals of each image first.

        The proposals are gone through again for the groups that have come about, until nothing changes: of many copies
        of an image each is proposed with a few others only, and few of these lead a group of their own for long.
        """
        leaders = self._leaders()
        proposals = [leaders[pairs] for pairs in propose_pairs(self.thumbnails[leaders], flip)]
        count, unlike = len(self.leader_of), np.empty(0, np.int64)

        def of_one_image(one: Ids, other: Ids) -> npt.NDArray[np.bool_]:
            return self._registered(one, other, flip) <= _MAX_MEMBER_DISTANCE

        num_leaders = -1
        while num_leaders != len(self._leaders()):
            num_leaders = len(self._leaders())
            for pairs in proposals:
                first, second = np.sort(self.leader_of[pairs], axis=1).T
                keys = np.setdiff1d((first * count + second)[first != second], unlike)
                targets, sources = np.divmod(keys, count)
                near = self._registered(targets, sources, flip) <= MAX_REGISTERED_DISTANCE
                unlike = np.union1d(unlike, keys[~near])
                self._merge_alike(targets[near], sources[near], of_one_image)

    def _leaders(self) -> Ids:
        return np.flatnonzero(self.leader_of == np.arange(len(self.leader_of)))

    def _registered(self, one: Ids, other: Ids, flip: bool) -> npt.NDArray[np.float32]:
        found = np.empty(len(one), dtype=np.float32)
        for rows in _chunks(len(one)):
            images = [torch.from_numpy(self.full[self.rows[ids[rows]]]).permute(0, 3, 1, 2) for ids in (one, other)]
            found[rows] = verify_pairs(images[0], images[1], flip=flip).distance.numpy()
        return found

    def _is_open(self, images: Ids) -> npt.NDArray[np.bool_]:
        """Say which images lead a group, alone or not, and were not compared too often."""
        leads: npt.NDArray[np.bool_] = self.leader_of[images] == images
        return leads & (self.failures[images] < MAX_FAILURES)

    def _project(self, images: Ids, number: int) -> npt.NDArray[np.float32]:
        """Return a random projection of the thumbnails, (N,); in whole numbers, so that it is exact on any machine."""
        size = math.prod(self.thumbnails.shape[1:])
        weights = np.random.default_rng(number).integers(-8, 9, size).astype(np.float32)
        projected = np.empty(len(images), dtype=np.float32)
        for rows in _chunks(len(images)):
            projected[rows] = self.thumbnails[images[rows]].reshape(-1, size).astype(np.float32) @ weights
        return projected

    def _merge(self, targets: Ids, sources: Ids) -> None:
        """Let the sources' groups follow the targets where all their members are like the target."""
        alike = self._alike(targets, sources)
        np.add.at(self.failures, np.concatenate((targets[~alike], sources[~alike])), 1)
        self._merge_alike(targets[alike], sources[alike], self._alike)

    def _merge_alike(self, targets: Ids, sources: Ids, alike: Callable[[Ids, Ids], npt.NDArray[np.bool_]]) -> None:
        """Let the sources' groups follow the targets, which they are like, where all their members are."""
        # Nobody follows an image that itself begins to follow, and nobody follows two.
        free = ~np.isin(targets, sources)
        sources, index = np.unique(sources[free], return_index=True)
        targets = targets[free][index]
        if len(sources) == 0:
            return
        new_leader = np.full(len(self.leader_of), -1)
        new_leader[sources] = targets
        members = np.flatnonzero(new_leader[self.leader_of] >= 0)
        of_members = new_leader[self.leader_of[members]]
        unlike = members[~alike(of_members, members)]
        refused = np.unique(self.leader_of[unlike])
        self.failures[refused] += 1
        new_leader[refused] = -1
        followers = members[new_leader[self.leader_of[members]] >= 0]
        self.leader_of[followers] = new_leader[self.leader_of[followers]]

    def _alike(self, one: Ids, other: Ids) -> npt.NDArray[np.bool_]:
        """Say which pairs are of one image."""
        self.num_compared += len(one)
        alike = np.empty(len(one), dtype=bool)
        for rows in _chunks(len(one)):
            alike[rows] = distances(self.thumbnails[one[rows]], self.thumbnails[other[rows]]) <= MAX_DISTANCE
        return alike


def _first_equal(thumbnails: Thumbnails) -> Ids:
    """Return for each thumbnail the first one that equals it in every byte, (N,) int64."""
    flat = np.ascontiguousarray(thumbnails).reshape(-1, math.prod(thumbnails.shape[1:]))
    # Equal ones share the product with a row of random numbers (modulo 2 ** 64), and so lie side by side.
    weights = np.random.default_rng(0).integers(0, 2**64, flat.shape[1], dtype=np.uint64)
    keys = np.concatenate([flat[rows].astype(np.uint64) @ weights for rows in _chunks(len(flat))] or [weights[:0]])
    order = np.argsort(keys, kind="stable")
    differs = np.empty(len(flat), dtype=bool)
    differs[:1] = True
    for rows in _chunks(len(flat) - 1):
        differs[1:][rows] = (flat[order[:-1][rows]] != flat[order[1:][rows]]).any(axis=1)
    first = np.empty(len(flat), dtype=np.int64)
    first[order] = order[differs][np.cumsum(differs) - 1]
    return first


def _standardized(thumbnails: Thumbnails) -> tuple[Pixels, npt.NDArray[np.float32]]:
    """Return the pixels with mean 0 and contrast 1, (N, side, side, 3), and the means, (N,)."""
    pixels = thumbnails.astype(np.float32)
    mean = pixels.mean(axis=(1, 2, 3))
    pixels -= mean[:, None, None, None]
    pixels /= np.maximum(_root_mean_square(pixels), _MIN_CONTRAST)[:, None, None, None]
    return pixels, mean


def _root_mean_square(values: Pixels) -> npt.NDArray[np.float32]:
    root: npt.NDArray[np.float32] = np.sqrt(np.square(values).mean(axis=tuple(range(1, values.ndim))))
    return root


def _chunks(length: int) -> Iterator[slice]:
    for start in range(0, length, _ROWS_PER_CHUNK):
        yield slice(start, start + _ROWS_PER_CHUNK)
