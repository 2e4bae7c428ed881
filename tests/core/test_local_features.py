"""Parts cut from and pasted into random scenes, whose place is known; votes against a slow loop."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from sd_memguard.core.local_features import (
    MIN_MATCHES,
    NUM_POINTS,
    NUM_VOTERS,
    ROW_BYTES,
    _votes,
    describe,
    find_shared,
    num_matches,
    unpack,
)
from sd_memguard.errors import UserError


def scene(seed, size=(320, 256)):
    """Return rectangles and ellipses of many sizes in random colours."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(random.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for number in range(150):
        left, top = random.integers(0, size[0]), random.integers(0, size[1])
        width, height = random.integers(4, 40, 2).tolist()
        shape = draw.ellipse if number % 2 else draw.rectangle
        shape((left, top, left + width, top + height), tuple(random.integers(0, 256, 3).tolist()))
    return image


def described(image):
    return describe(np.asarray(image))


def matches(one, other):
    return num_matches(unpack(described(one)), unpack(described(other)))


def test_without_opencv_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"pip install 'sd-memguard\[local-features\]'"):
        described(scene(0))


class TestWithOpenCV:
    @pytest.fixture(autouse=True)
    def _opencv(self):
        pytest.importorskip("cv2")

    def test_points_are_packed_and_unpacked(self):
        import cv2

        image = scene(0)
        row = described(image)
        assert row.shape == (ROW_BYTES,)
        found = unpack(row)
        points, descriptors = cv2.SIFT_create(NUM_POINTS).detectAndCompute(np.asarray(image.convert("L")), None)
        # Pillow's grey and OpenCV's differ by rounding, so not every point is the same.
        places = np.array([point.pt for point in points])
        apart = np.abs(found.places[:, None] - places[None]).max(2)
        assert (apart.min(1) < 0.1).mean() > 0.8
        nearest = apart.argmin(1)
        roots = np.sqrt(descriptors / descriptors.sum(1, keepdims=True))[nearest]
        cosine = (found.vectors.numpy() * roots).sum(1)
        assert np.median(cosine) > 0.99
        assert unpack(torch.zeros(ROW_BYTES, dtype=torch.uint8)).places.shape == (0, 2)

    @pytest.mark.parametrize("area", [0.5, 0.25])
    def test_a_crop_is_found(self, area):
        image = scene(1, (640, 512))
        width, height = round(640 * area**0.5), round(512 * area**0.5)
        part = image.crop((90, 70, 90 + width, 70 + height)).resize((640, 512), Image.Resampling.BICUBIC)
        assert matches(part, image) >= MIN_MATCHES

    def test_a_pasted_part_is_found_and_two_scenes_share_nothing(self):
        image, other = scene(2), scene(3)
        assert matches(image, other) < MIN_MATCHES
        other.paste(image.resize((160, 128), Image.Resampling.BICUBIC), (100, 80))
        assert matches(other, image) >= MIN_MATCHES

    def test_a_flipped_image_is_another_one(self):
        image = scene(4)
        assert matches(ImageOps.mirror(image), image) < MIN_MATCHES
        views = torch.stack([described(one) for one in (ImageOps.mirror(image), image)])[None]
        found = find_shared(views, [torch.stack([described(scene(5)), described(image)])])
        assert found.row.tolist() == [1]
        assert found.num_matches.item() >= MIN_MATCHES

    def test_the_image_itself_does_not_count(self):
        images = [scene(6), scene(7), scene(6).crop((40, 40, 280, 220))]
        known = torch.stack([described(image) for image in images])
        found = find_shared(known[:, None], [known[:2], known[2:]], own=torch.arange(3))
        assert found.row[[0, 2]].tolist() == [2, 0]
        assert found.num_matches[1] < MIN_MATCHES <= found.num_matches[0]

    def test_flat_and_tiny_images_share_nothing(self):
        known = torch.stack([described(Image.new("RGB", size, "red")) for size in ((200, 200), (3, 3), (1, 900))])
        assert find_shared(known[:, None], [known]).num_matches.tolist() == [0, 0, 0]

    def test_votes_equal_those_of_a_slow_loop(self):
        known = torch.stack([described(scene(seed)) for seed in range(8, 13)])
        query = described(scene(9).crop((30, 30, 200, 200)))
        slow = [0] * len(known)
        for vector in unpack(query).vectors[:NUM_VOTERS]:
            best = [float((unpack(row).vectors @ vector).max()) for row in known]
            slow[int(np.argmax(best))] += 1
        votes = _votes(query[None, None], [known[:2], known[2:4], known[4:]], None)
        assert votes[0, 0].tolist() == slow
        assert np.argmax(slow) == 1
