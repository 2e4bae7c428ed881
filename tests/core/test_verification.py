"""Copies made by Pillow, whose changes are known, against images that are only alike."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from sd_memguard.assets import demo_data_path, demo_heldout_path
from sd_memguard.core.verification import turn_hue, verify_pairs

SIDE = 64


def read(folder, count):
    files = sorted(folder.rglob("*.png"))
    images = {file.read_bytes(): file for file in files}
    return [Image.open(file).convert("RGB") for file in list(images.values())[:count]]


def as_tensor(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Return what is left without these shares of the edge, scaled to the old size."""
    box = (SIDE * left, SIDE * top, SIDE * (1 - right), SIDE * (1 - bottom))
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)


def compressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file).convert("RGB")


def rescaled(image: Image.Image) -> Image.Image:
    small = image.resize((40, 40), Image.Resampling.BICUBIC)
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "same": lambda image: image,
    "crop": lambda image: cropped(image, 0.1, 0.02, 0.04, 0.1),
    "crop and JPEG": lambda image: compressed(cropped(image, 0, 0.06, 0.06, 0)),
    "JPEG": compressed,
    "scale": rescaled,
    "flip": ImageOps.mirror,
    "rotation": lambda image: image.rotate(5, Image.Resampling.BICUBIC, fillcolor=image.getpixel((0, 0))),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
    "saturation": lambda image: ImageEnhance.Color(image).enhance(0.7),
}


@pytest.fixture(scope="module")
def sources():
    return read(demo_data_path(), 40)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_image_is_near_its_source(sources, change):
    copies = as_tensor([CHANGES[change](image) for image in sources])
    found = verify_pairs(copies, as_tensor(sources))
    assert (found.distance < 0.12).float().mean() >= 0.95
    if change == "same":
        assert found.distance.max() < 1e-3


def test_another_image_is_far(sources):
    """Images that were never in the set, each against one of it; near-duplicates of emoji are few."""
    others = as_tensor(read(demo_heldout_path(), 40))
    assert (verify_pairs(others, as_tensor(sources)).distance < 0.25).float().mean() <= 0.05


def test_the_crop_is_found():
    """The map takes the corners of the query to where the crop had its corners."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    source = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    found = verify_pairs(as_tensor([cropped(source, 0.1, 0.05, 0.02, 0.03)]), as_tensor([source]))
    corners = found.transform[0] @ torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [1.0, 1.0]])
    expected = torch.tensor([[-0.8, 0.96], [-0.9, 0.94]])
    assert torch.allclose(corners, expected, atol=0.02)
    assert not found.is_flipped.item()


def test_flips_count_only_where_asked():
    coarse = np.random.default_rng(3).integers(0, 255, (10, 6, 6, 3), dtype=np.uint8)
    images = as_tensor([Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for one in coarse])
    mirrored = verify_pairs(images.flip(-1), images)
    assert mirrored.is_flipped.all()
    assert mirrored.distance.max() < 1e-3
    assert verify_pairs(images.flip(-1), images, flip=False).distance.min() > 0.3


def test_a_part_in_another_colour_makes_another_image():
    """Two faces that are one but for the hair."""
    image = np.full((SIDE, SIDE, 3), 255, np.uint8)
    image[20:50, 16:48] = (230, 180, 150)
    image[50:, 10:54] = (60, 90, 200)
    other = image.copy()
    image[8:20, 16:48], other[8:20, 16:48] = (200, 60, 120), (70, 40, 20)
    pair = as_tensor([Image.fromarray(image)]), as_tensor([Image.fromarray(other)])
    assert verify_pairs(*pair).distance.item() > 0.25


def test_the_result_does_not_depend_on_the_others_of_the_batch(sources):
    images = as_tensor(sources)[:6]
    queries = images.roll(1, 0).flip(-1)
    together = verify_pairs(queries, images).distance
    alone = torch.cat([verify_pairs(queries[row : row + 1], images[row : row + 1]).distance for row in range(6)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_no_pairs_and_flat_images():
    assert (
        len(verify_pairs(torch.zeros(0, 3, 64, 64, dtype=torch.uint8), torch.zeros(0, 3, 64, 64).byte()).distance) == 0
    )
    flat = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    assert verify_pairs(flat, flat).distance.item() < 1e-3


def test_hue_turns_like_pillow():
    random = np.random.default_rng(1)
    image = Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    values = np.asarray(image.convert("HSV")).copy()
    values[..., 0] += 32  # 32/256 of a turn
    expected = np.asarray(Image.fromarray(values, "HSV").convert("RGB")).astype(float)
    turned = turn_hue(as_tensor([image]).float() / 255, torch.tensor([45.0]))[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(turned - expected).mean() < 2
