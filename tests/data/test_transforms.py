"""Random affine maps of the images: how far they go, what comes in at the sides, and what they depend on."""

import numpy as np
import pytest
import torch
from PIL import Image

from sd_memguard.data.target_sizes import Size
from sd_memguard.data.transforms import NUM_AFFINE_VARIANTS, Preprocess

SIDE = 64
SHARE = 0.1
KEY, OTHER = b"k" * 16, b"o" * 16
SQUARE = Size(SIDE, SIDE)


@pytest.fixture
def make_preprocess(configure):
    """Return a function that makes the preprocessing from settings."""

    def make(seed: int = 0, size: Size = SQUARE, **settings) -> Preprocess:
        return Preprocess(configure(**{"random_affine": SHARE, **settings}), seed, size)

    return make


def place_image(side: int = SIDE) -> Image.Image:
    """Return an image whose red and green say how far to the right and how far down a pixel is."""
    place = np.arange(side, dtype=np.uint8) * (256 // side)
    right, down = np.meshgrid(place, place)
    return Image.fromarray(np.stack([right, down, np.zeros_like(right)], axis=-1))


def fitted_map(moved: torch.Tensor) -> np.ndarray:
    """Return the map from a moved place image to the original, (2, 3), fitted to the pixels that need no mirror."""
    inside = slice(SIDE // 4, -SIDE // 4)
    sources = ((moved[:2, inside, inside].numpy() + 1) * 127.5 / (256 // SIDE)).reshape(2, -1) - (SIDE - 1) / 2
    down, right = np.mgrid[0:SIDE, 0:SIDE][:, inside, inside].reshape(2, -1) - (SIDE - 1) / 2
    solution, *_ = np.linalg.lstsq(np.stack([right, down, np.ones_like(right)], axis=1), sources.T, rcond=None)
    return solution.T


def test_images_are_shifted_turned_and_zoomed_up_to_the_share_and_no_further(make_preprocess):
    preprocess, image = make_preprocess(), place_image()
    maps = np.stack([fitted_map(preprocess(image, bytes([number] * 16), (0, 0, 0))) for number in range(200)])
    # The inverse of a similarity: it turns and zooms by what the image was turned and zoomed back, and shifts back.
    np.testing.assert_allclose(maps[:, 0, 0], maps[:, 1, 1], atol=0.01)
    np.testing.assert_allclose(maps[:, 0, 1], -maps[:, 1, 0], atol=0.01)
    zooms = 1 / np.hypot(maps[:, 0, 0], maps[:, 0, 1])
    turns = np.arctan2(maps[:, 0, 1], maps[:, 0, 0])
    shifts = np.linalg.solve(maps[:, :, :2], -maps[:, :, 2:])[..., 0] / SIDE
    for moved_by in (zooms - 1, turns, *(2 * shifts.T)):
        assert -2.2 * SHARE < moved_by.min() < -1.8 * SHARE
        assert 1.8 * SHARE < moved_by.max() < 2.2 * SHARE
        assert abs(moved_by.mean()) < 0.3 * SHARE


@pytest.mark.parametrize("target", [(64, 64), (96, 40), (40, 96)])
@pytest.mark.parametrize("size", [(64, 64), (150, 64), (64, 300)])
@pytest.mark.parametrize("center_crop", [True, False])
def test_no_corner_is_left_empty(make_preprocess, size, target, center_crop):
    preprocess = make_preprocess(random_affine=0.2, center_crop=center_crop, size=Size(*target))
    white = Image.new("RGB", size, "white")
    for number in range(50):
        assert bool((preprocess(white, bytes([number] * 16), (0, 0, number)) == 1).all())


def test_what_lies_around_the_crop_comes_in(make_preprocess):
    image = Image.new("RGB", (3 * SIDE, SIDE), "red")
    image.paste("blue", (SIDE, 0, 2 * SIDE, SIDE))
    preprocess = make_preprocess(center_crop=True)
    moved = torch.stack([preprocess(image, bytes([number] * 16), (0, 0, 0)) for number in range(20)])
    left, middle = moved[:, :, SIDE // 2, 0], moved[:, :, SIDE // 2, SIDE // 2]
    assert bool((middle == torch.tensor([-1.0, -1.0, 1.0])).all())
    assert 0 < int((left[:, 0] > 0.9).sum()) < 20


def test_each_image_has_a_few_maps_of_its_own_which_visits_take_at_random(make_preprocess):
    image, addresses = place_image(), [(0, number, 7) for number in range(100)]
    seen = [make_preprocess()(image, KEY, address).numpy().tobytes() for address in addresses]
    other = [make_preprocess()(image, OTHER, address).numpy().tobytes() for address in addresses]
    assert len(set(seen)) == len(set(other)) == NUM_AFFINE_VARIANTS
    assert not set(seen) & set(other)
    torch.rand(5)
    assert [make_preprocess()(image, KEY, address).numpy().tobytes() for address in addresses] == seen
    another_run = [make_preprocess(seed=1)(image, KEY, address).numpy().tobytes() for address in addresses]
    assert another_run != seen
    assert set(another_run) == set(seen)


@pytest.mark.parametrize("settings", [{}, {"random_flip": True}, {"random_affine": 0.0, "random_flip": True}])
def test_the_views_are_what_visits_see(make_preprocess, settings):
    preprocess, image = make_preprocess(center_crop=True, **settings), place_image()
    kept = [preprocess.centered(image, KEY, view) for view in preprocess.views]
    addresses = [(0, number, 7) for number in range(200)]
    views = preprocess.choose_views(addresses).tolist()
    assert set(views) == set(range(len(kept)))
    for address, view in zip(addresses, views, strict=True):
        assert torch.equal(preprocess(image, KEY, address), kept[view])


def test_without_a_share_nothing_moves(make_preprocess):
    still = make_preprocess(random_affine=0.0)
    assert torch.equal(still(place_image(), KEY, (0, 0, 0)), still.fixed(place_image()))


@pytest.mark.parametrize("center_crop", [True, False])
def test_a_tiny_share_is_the_crop_itself(make_preprocess, center_crop):
    random = np.random.default_rng(0).integers(0, 256, (SIDE + 31, SIDE, 3), dtype=np.uint8)
    image = Image.fromarray(random)
    moved, still = (
        make_preprocess(random_affine=share, center_crop=center_crop)(image, KEY, (0, 0, 3)) for share in (1e-6, 0.0)
    )
    torch.testing.assert_close(moved, still, rtol=0, atol=1.5 / 127.5)


# Sizes of buckets.


def by_pillow(image: Image.Image, width: int, height: int, place: str) -> torch.Tensor:
    """Return an image that covers a size, cut at a corner of it or in the middle, by PIL alone."""
    scale = max(width / image.width, height / image.height)
    # One side fits; of the other one the part of a pixel is cut off.
    covering = image.resize(
        (max(width, int(image.width * scale + 1e-9)), max(height, int(image.height * scale + 1e-9))),
        Image.Resampling.LANCZOS,
    )
    left, top = covering.width - width, covering.height - height
    if place == "middle":
        left, top = round(left / 2), round(top / 2)
    cut = covering.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("target", [(64, 64), (96, 40), (40, 96), (72, 56)])
@pytest.mark.parametrize("own", [(64, 64), (151, 64), (64, 301), (96, 40), (30, 30), (500, 391)])
def test_an_image_is_resized_and_cut_as_by_pillow(make_preprocess, own, target):
    pixels = np.random.default_rng(0).integers(0, 256, (own[1], own[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    middle = make_preprocess(random_affine=0.0, center_crop=True, size=Size(*target))
    assert torch.equal(middle(image, KEY, (0, 0, 0)), by_pillow(image, *target, "middle"))
    assert torch.equal(middle.fixed(image), by_pillow(image, *target, "middle"))
    anywhere = make_preprocess(random_affine=0.0, center_crop=False, size=Size(*target))
    crops = {anywhere(image, KEY, (0, 0, number)).numpy().tobytes() for number in range(400)}
    resized = anywhere.resize(image).size
    most = (resized[0] - target[0] + 1) * (resized[1] - target[1] + 1)
    assert len(crops) <= most
    if most <= 40:  # with so many tries each place comes, also the last one
        assert len(crops) == most
        assert by_pillow(image, *target, "end").numpy().tobytes() in crops


def test_affine_variants_of_a_wide_bucket_move_by_shares_of_its_own_sides(make_preprocess):
    """The square of a square image in the middle of a wide one: what is seen of it moves further across than down."""
    wide = make_preprocess(size=Size(4 * SIDE, SIDE), center_crop=True)
    image = Image.new("RGB", (4 * SIDE, SIDE))
    image.paste("white", (2 * SIDE - 4, SIDE // 2 - 4, 2 * SIDE + 4, SIDE // 2 + 4))
    spots = []
    for number in range(200):
        down, across = np.nonzero(wide(image, bytes([number] * 16), (0, 0, 0))[0].numpy() > 0)
        spots.append((across.mean() - 2 * SIDE + 0.5, down.mean() - SIDE / 2 + 0.5))
    reached = np.abs(spots).max(axis=0)
    assert 0.85 * SHARE * 4 * SIDE < reached[0] < 1.15 * SHARE * 4 * SIDE
    assert 0.75 * SHARE * SIDE < reached[1] < 1.25 * SHARE * SIDE
