"""Near-identical pictures, found in near-linear time: a 64-bit hash proposes pairs, a thumbnail confirms them.

Ours, not the paper's. A perceptual hash is a row of signs of low frequencies, so that two versions of one picture
differ in few bits. The hashes are sorted under 28 orders of their bits, one for each two of their eight bytes in
front: two hashes that differ in six bits at most agree in two bytes at least, and so lie near each other in one of the
orders (the sorted tables of Manku et al. 2007, "Detecting near-duplicates for web crawling"). Each picture is
compared with the next few in each order and no others, however many look alike.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import numpy.typing as npt

THUMBNAIL_SIDE = 12
"""Side of a thumbnail in pixels; of 8, 12, 16, 24 the smallest that tells apart as well as the larger ones."""
MAX_DISTANCE = 0.12
"""Thumbnails no farther apart than this are of one picture; measured, see docs/method.md."""
MAX_BITS = 10
"""Hashes that differ in more bits are not looked at."""
WINDOW = 16
"""Neighbours in each order with which a picture is compared."""

_MIN_CONTRAST = 4.0  # grey levels; below that a picture counts as flat and its noise is not blown up
_MAX_BRIGHTER = 40.0  # grey levels by which one of two pictures of the same pattern may be brighter
_MIN_COEFFICIENT = 2.0  # grey levels; a frequency as weak as this is noise, whatever its sign
_ROWS_PER_CHUNK = 16_384
_ORDERS = [[*front, *(byte for byte in range(8) if byte not in front)] for front in combinations(range(8), 2)]

Thumbnails = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]


def find_groups(thumbnails: Thumbnails) -> Ids:
    """Return for each picture the first one of its group, (N,) int64; its own number where it is single.

    Every member of a group was compared with the first one, so a chain of pictures each like the next is not one group.
    The result depends on nothing but the thumbnails and their order.

    Args:
        thumbnails: (N, side, side, 3) uint8, RGB.
    """
    first_equal = _first_equal(thumbnails)
    distinct = np.flatnonzero(first_equal == np.arange(len(thumbnails)))
    leaders = _Leaders(thumbnails[distinct])
    for order in _ORDERS:
        leaders.merge_neighbours(order)
    position = np.searchsorted(distinct, first_equal)
    return distinct[leaders.leader_of[position]]


def hash_thumbnails(thumbnails: Thumbnails) -> npt.NDArray[np.uint8]:
    """Return the perceptual hashes, (N, 8) uint8: which of the 8 x 8 lowest frequencies of the grey picture are large.

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

    The root mean square difference of the pixels, each picture's mean subtracted and its contrast divided out: 0 for
    the same pattern, also darker, brighter or of another contrast; about 1.4 for unrelated ones. Infinite where one is
    much brighter than the other.

    Args:
        first: (N, side, side, 3) uint8.
        second: as many.
    """
    (one, mean), (other, other_mean) = _standardized(first), _standardized(second)
    apart = np.sqrt(np.square(one - other).mean(axis=1))
    apart[np.abs(mean - other_mean) > _MAX_BRIGHTER] = np.inf
    return apart


class _Leaders:
    """Pictures that lead groups, and who follows whom.

    Args:
        thumbnails: (N, side, side, 3) uint8, no two equal.
    """

    def __init__(self, thumbnails: Thumbnails) -> None:
        self.thumbnails = thumbnails
        self.hashes = hash_thumbnails(thumbnails)
        self.leader_of = np.arange(len(thumbnails))
        self.num_compared = 0

    def merge_neighbours(self, byte_order: list[int]) -> None:
        """Merge groups whose leaders are alike and neighbours when the hashes are sorted by bytes in this order."""
        leaders = np.flatnonzero(self.leader_of == np.arange(len(self.leader_of)))
        keys = np.ascontiguousarray(self.hashes[leaders][:, byte_order]).view(">u8").ravel().astype(np.uint64)
        order = np.argsort(keys, kind="stable")
        keys, leaders = keys[order], leaders[order]
        for offset in range(1, min(WINDOW, len(leaders) - 1) + 1):
            near = np.flatnonzero(np.bitwise_count(keys[:-offset] ^ keys[offset:]) <= MAX_BITS)
            one, other = leaders[near], leaders[near + offset]
            both_lead = (self.leader_of[one] == one) & (self.leader_of[other] == other)
            self._merge(np.minimum(one, other)[both_lead], np.maximum(one, other)[both_lead])

    def _merge(self, targets: Ids, sources: Ids) -> None:
        """Let the sources' groups follow the targets where all their members are like the target."""
        alike = self._alike(targets, sources)
        targets, sources = targets[alike], sources[alike]
        # Nobody follows a picture that itself begins to follow, and nobody follows two.
        free = ~np.isin(targets, sources)
        sources, index = np.unique(sources[free], return_index=True)
        targets = targets[free][index]
        if len(sources) == 0:
            return
        new_leader = np.full(len(self.leader_of), -1)
        new_leader[sources] = targets
        members = np.flatnonzero(new_leader[self.leader_of] >= 0)
        of_members = new_leader[self.leader_of[members]]
        unlike = members[~self._alike(of_members, members)]
        new_leader[self.leader_of[unlike]] = -1
        followers = members[new_leader[self.leader_of[members]] >= 0]
        self.leader_of[followers] = new_leader[self.leader_of[followers]]

    def _alike(self, one: Ids, other: Ids) -> npt.NDArray[np.bool_]:
        """Say which pairs are of one picture."""
        self.num_compared += len(one)
        alike = np.empty(len(one), dtype=bool)
        for rows in _chunks(len(one)):
            alike[rows] = distances(self.thumbnails[one[rows]], self.thumbnails[other[rows]]) <= MAX_DISTANCE
        return alike


def _first_equal(thumbnails: Thumbnails) -> Ids:
    """Return for each thumbnail the first one that equals it in every byte, (N,) int64."""
    flat = np.ascontiguousarray(thumbnails).reshape(len(thumbnails), -1)
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


def _standardized(thumbnails: Thumbnails) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the pixels with mean 0 and contrast 1, (N, side * side * 3), and the means, (N,)."""
    pixels = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    mean = pixels.mean(axis=1)
    pixels -= mean[:, None]
    pixels /= np.maximum(np.sqrt(np.square(pixels).mean(axis=1)), _MIN_CONTRAST)[:, None]
    return pixels, mean


def _chunks(length: int) -> Iterator[slice]:
    for start in range(0, length, _ROWS_PER_CHUNK):
        yield slice(start, start + _ROWS_PER_CHUNK)
