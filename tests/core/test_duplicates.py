import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_memguard.assets import demo_data_path
from sd_memguard.core import duplicates
from sd_memguard.core.duplicates import (
    MAX_DISTANCE,
    MAX_FAILURES,
    SMALL_SIDE,
    THUMBNAIL_SIDE,
    distances,
    find_groups,
    hash_thumbnails,
    keep_rows,
    make_thumbnail,
    shrink,
)
from sd_memguard.core.verification import verify_pairs
from tests.reference.slow_duplicates import slow_distance, slow_groups, slow_hash

SHAPE = (THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)
SMALL_SHAPE = (SMALL_SIDE, SMALL_SIDE, 3)


def smooth(random, count, side=THUMBNAIL_SIDE):
    """Return different smooth images in float, (count, side, side, 3), of mean 127 and contrast 35."""
    place = (np.arange(side) + 0.5) / side
    waves = np.cos(np.pi * np.outer(np.arange(5), place))
    coarse = np.einsum("npqc,py,qx->nyxc", random.normal(size=(count, 5, 5, 3)), waves, waves)
    centered = coarse - coarse.mean(axis=(1, 2, 3), keepdims=True)
    return 127 + 35 * centered / centered.std(axis=(1, 2, 3), keepdims=True)


def enlarged(small):
    """Return thumbnails whose shrunk version is this."""
    return small.repeat(3, axis=1).repeat(3, axis=2)


def are_one_image(small, one, other):
    """Whether pairs are near, as they are or by registration."""
    full = torch.from_numpy(enlarged(small)).permute(0, 3, 1, 2)
    registered = verify_pairs(full[one], full[other], flip=False).distance.numpy()
    return (distances(small[one], small[other]) <= MAX_DISTANCE) | (registered <= 0.05)


def as_bytes(images):
    return np.clip(np.round(images), 0, 255).astype(np.uint8)


@settings(deadline=None, max_examples=4)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 99))
def test_planted_copies_are_found_and_equal_the_slow_comparison_of_all_pairs(labels, seed):
    # Copies: noise of 1 level, up to 5 % brighter or darker; every fourth is exact.
    random = np.random.default_rng(seed)
    images = smooth(random, 10)[labels]
    changed = images * random.uniform(0.95, 1.05, (len(labels), 1, 1, 1)) + random.normal(0, 1, images.shape)
    thumbnails = as_bytes(np.where((np.arange(len(labels)) % 4 == 0)[:, None, None, None], images, changed))
    groups = find_groups(thumbnails)
    assert groups.tolist() == [labels.index(label) for label in labels]
    assert groups.tolist() == slow_groups(shrink(thumbnails).tolist(), MAX_DISTANCE)


@settings(deadline=None, max_examples=4)
@given(st.integers(0, 999), st.floats(5, 60))
def test_every_member_is_like_the_first_one(seed, spread):
    # Clouds of images around a few centres, as wide as the threshold, also much wider.
    random = np.random.default_rng(seed)
    clouds = smooth(random, 4, SMALL_SIDE)[random.integers(0, 4, 120)] + random.normal(0, spread, (120, *SMALL_SHAPE))
    small = as_bytes(clouds)
    groups = find_groups(enlarged(small))
    assert (groups <= np.arange(120)).all()
    assert (groups[groups] == groups).all()
    assert (are_one_image(small, groups, np.arange(120))).all()


def test_a_chain_of_look_alikes_is_not_one_group():
    start, end = smooth(np.random.default_rng(3), 2, SMALL_SIDE)
    chain = as_bytes(start + np.linspace(0, 1, 40)[:, None, None, None] * (end - start))
    assert distances(chain[:-1], chain[1:]).max() < MAX_DISTANCE
    groups = find_groups(enlarged(chain))
    assert len(set(groups.tolist())) > 3
    assert (are_one_image(chain, groups, np.arange(40))).all()


def test_distance_equals_the_slow_one():
    random = np.random.default_rng(0)
    thumbnails = as_bytes(smooth(random, 6, SMALL_SIDE))
    thumbnails[5] = 130  # flat
    found = distances(thumbnails[:-1], thumbnails[1:])
    slow = [
        slow_distance(one, other) for one, other in zip(thumbnails[:-1].tolist(), thumbnails[1:].tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(slow, rel=1e-5)
    assert min(slow) > 0.4  # too far apart for a crop to be thought of


def test_brightness_and_contrast_do_not_count_but_a_black_image_is_no_white_one():
    image = smooth(np.random.default_rng(1), 1, SMALL_SIDE)
    versions = as_bytes(np.concatenate([image, 0.9 * image, image - 20, 100 + 0.5 * (image - 100)]))
    assert distances(versions[[0, 0, 0]], versions[1:]).max() < 0.04
    flat = np.stack([np.full(SMALL_SHAPE, level, dtype=np.uint8) for level in (0, 20, 255)])
    assert distances(flat[[0, 0]], flat[1:]).tolist() == [0, np.inf]
    assert find_groups(enlarged(flat)).tolist() == [0, 0, 2]


def test_a_small_shift_is_taken_out_and_a_large_one_is_not():
    # One image sampled at places that are shifted and stretched by parts of a pixel, as a crop does.
    def sample(shift, stretch=1.0):
        place = (np.arange(SMALL_SIDE) - 5.5) * stretch + shift
        wave = np.sin(place[:, None] * 0.9 + place[None, :] * 0.4) + np.cos(place[:, None] * 0.3 - place[None, :])
        return as_bytes(np.repeat(127 + 50 * wave[..., None], 3, axis=2))

    base = sample(0)
    near, stretched, far = sample(0.3), sample(0.1, 1.04), sample(1.5)
    for moved in (near, stretched):
        assert slow_distance(base.tolist(), moved.tolist()) > 1.4 * MAX_DISTANCE
        assert distances(base[None], moved[None]) < 0.6 * MAX_DISTANCE
        assert distances(moved[None], base[None]) == pytest.approx(distances(base[None], moved[None]), rel=1e-3)
    assert distances(base[None], far[None]) > 3 * MAX_DISTANCE


def test_a_flipped_image_is_another_one_unless_asked():
    thumbnails = as_bytes(smooth(np.random.default_rng(2), 5))
    both = np.concatenate([thumbnails, thumbnails[:, :, ::-1]])
    assert find_groups(both).tolist() == list(range(10))
    assert find_groups(both, flip=True).tolist() == [*range(5), *range(5)]


def cropped(image, left, top, right, bottom):
    """Return the thumbnail of an image without these shares of its edge."""
    width, height = image.size
    return make_thumbnail(
        image.crop(
            (round(left * width), round(top * height), width - round(right * width), height - round(bottom * height))
        )
    )


def test_crops_of_five_percent_are_found_among_look_alikes():
    """All bundled images, and of each a crop by up to 5% of each side, in whole pixels."""
    files = {file.read_bytes(): file for file in sorted(demo_data_path().rglob("*.png"))}
    image_module = pytest.importorskip("PIL.Image")
    images = [image_module.open(file).convert("RGB") for file in list(files.values())[:200]]
    random = np.random.default_rng(0)
    originals = np.stack([make_thumbnail(image) for image in images])
    crops = np.stack([cropped(image, *random.uniform(0, 0.05, 4)) for image in images])
    groups = find_groups(np.concatenate([originals, crops]))
    assert (groups[:200] == groups[200:]).mean() >= 0.95
    assert (groups[:200] == np.arange(200)).mean() >= 0.98


def test_many_crops_of_one_image_find_each_other():
    """Of 12 images 15 crops each, by up to 8% at each edge: any two of one image are up to 16% apart."""
    image_module = pytest.importorskip("PIL.Image")
    files = {file.read_bytes(): file for file in sorted(demo_data_path().rglob("*.png"))}
    images = [image_module.open(file).convert("RGB") for file in list(files.values())[:12]]
    random = np.random.default_rng(0)
    crops = np.stack([cropped(image, *random.uniform(0, 0.08, 4)) for _ in range(15) for image in images])
    of_image = find_groups(crops).reshape(15, 12)
    assert np.mean([len(set(column)) for column in of_image.T]) < 1.3
    assert not any(set(one) & set(other) for one, other in itertools.combinations(of_image.T, 2))


def test_hash_equals_the_slow_transform():
    thumbnails = as_bytes(smooth(np.random.default_rng(4), 3, SMALL_SIDE))
    thumbnails[2] = 200
    bits = np.unpackbits(hash_thumbnails(thumbnails), axis=1)
    places = sorted(((u, v) for u in range(8) for v in range(8)), key=lambda place: (sum(place), place))
    for row, thumbnail in zip(bits, thumbnails.tolist(), strict=True):
        assert {place for place, bit in zip(places, row, strict=True) if bit} == slow_hash(thumbnail)
    assert bits.sum(axis=1).tolist()[2] == 1  # a flat image has a mean and nothing else


@pytest.fixture
def compared(monkeypatch):
    """Return a list that grows by the number of pairs at each comparison."""
    counts, compare = [], duplicates.distances

    def counted(first, second):
        counts.append(len(first))
        return compare(first, second)

    monkeypatch.setattr(duplicates, "distances", counted)
    return counts


def test_equal_images_are_not_compared_at_all(compared):
    assert set(find_groups(np.full((5000, *SHAPE), 255, dtype=np.uint8)).tolist()) == {0}
    assert sum(compared) == 0


@pytest.mark.parametrize("count", [250, 1000])
def test_images_that_differ_under_one_hash_cost_a_bounded_number_of_comparisons_each(compared, count, monkeypatch):
    # Nothing but weak noise: every hash is that of a flat image, and no two are alike.
    random = np.random.default_rng(5)
    small = (200 + (random.random((count, *SMALL_SHAPE)) < 0.3)).astype(np.uint8)
    assert len(np.unique(hash_thumbnails(small), axis=0)) == 1
    monkeypatch.setattr(duplicates._Leaders, "merge_registered", lambda *_: None)
    assert len(set(find_groups(enlarged(small)).tolist())) == count
    assert sum(compared) <= (MAX_FAILURES / 2 + 1) * count


def test_many_copies_of_one_image_are_one_group_at_a_few_comparisons_each(compared):
    random = np.random.default_rng(6)
    thumbnails = as_bytes(smooth(random, 1) + random.normal(0, 1, (1000, *SHAPE)))
    assert set(find_groups(thumbnails).tolist()) == {0}
    assert sum(compared) <= 8 * 1000


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images(count):
    assert find_groups(as_bytes(smooth(np.random.default_rng(7), count))).tolist() == list(range(count))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rows_are_kept_in_place(share):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (10_000, 2, 2, 3), dtype=np.uint8)
    rows = np.flatnonzero(random.random(len(images)) < share)
    expected = images[rows]
    kept = keep_rows(images, rows)
    assert (kept == expected).all()
    assert kept.shape == expected.shape
    assert len(rows) == 0 or np.shares_memory(kept, images)
