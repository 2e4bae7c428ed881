"""Proposals against the nearest neighbours that comparing all pairs finds."""

import numpy as np
import pytest

from sd_memguard.core import proposals
from sd_memguard.core.proposals import NUM_PROPOSED, propose_pairs


def thumbnails(random, count):
    """Return smooth images, (count, 12, 12, 3) uint8."""
    place = np.cos(np.pi * np.outer((np.arange(12) + 0.5) / 12, np.arange(4)))
    coarse = np.einsum("nabc,ya,xb->nyxc", random.normal(size=(count, 4, 4, 3)), place, place)
    return np.clip(127 + 25 * coarse, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("flip", [False, True])
def test_disturbed_copies_are_proposed_first(flip):
    random = np.random.default_rng(0)
    images = thumbnails(random, 1500)
    copies = np.clip(images + random.normal(0, 8, images.shape), 0, 255).astype(np.uint8)
    copies = copies[:, :, ::-1] if flip else copies
    first = next(propose_pairs(np.concatenate([images, copies]), flip))
    found = {tuple(pair) for pair in first.tolist()}
    assert sum((row, row + 1500) in found for row in range(1500)) >= 0.99 * 1500


def test_pairs_are_in_order_distinct_and_few():
    random = np.random.default_rng(1)
    images = thumbnails(random, 30).repeat(20, axis=0)
    images = np.clip(images + random.normal(0, 3, images.shape), 0, 255).astype(np.uint8)
    pairs = np.concatenate(list(propose_pairs(images, flip=True)))
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert len(np.unique(pairs, axis=0)) == len(pairs) <= 2 * NUM_PROPOSED * len(images)
    assert (pairs[:, 0] // 20 == pairs[:, 1] // 20).all()


def test_the_same_images_give_the_same_pairs():
    images = thumbnails(np.random.default_rng(2), 200)
    one, other = (np.concatenate(list(propose_pairs(images, flip=False))) for _ in range(2))
    assert (one == other).all()


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_and_equal_images(count):
    images = np.full((count, 12, 12, 3), 90, dtype=np.uint8)
    pairs = np.concatenate([np.empty((0, 2), int), *propose_pairs(images, flip=False)])
    expected = {(low, high) for low in range(count) for high in range(low + 1, count)}
    assert {tuple(pair) for pair in pairs.tolist()} == expected


def test_work_grows_with_the_number_of_images(monkeypatch):
    """Counted, not timed: the pairs whose distance is computed in leaves."""
    counts = {}
    split = np.argpartition
    for number in (1000, 8000):
        seen = []
        monkeypatch.setattr(
            proposals.np, "argpartition", lambda a, *b, s=seen, **c: (s.append(a.size), split(a, *b, **c))[1]
        )
        list(propose_pairs(thumbnails(np.random.default_rng(3), number), flip=False))
        counts[number] = sum(seen)
    assert counts[8000] <= 8.5 * counts[1000]
