import io
import math

import pytest
import torch
from PIL import Image

from sd_memguard.assets import demo_data_path
from sd_memguard.audit import AuditError
from sd_memguard.audit.captions import choose_captions
from sd_memguard.audit.images import as_image, as_rows, load_images
from sd_memguard.audit.metrics.similarity import (
    best_matches,
    cosine,
    distance_ratio,
    distinct,
    find_copies,
    nearest,
    squared_distance_ratio,
)


def slow_distances(query, gallery):
    """Every distance by hand, in double precision."""
    return [
        [math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True))) for other in gallery.tolist()]
        for one in query.tolist()
    ]


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 1000])
def test_nearest_equals_the_double_loop_whatever_the_chunk(chunk):
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.rand(9, 6, generator=generator), torch.rand(13, 6, generator=generator)
    found = nearest(query, gallery, k=5, chunk=chunk)
    for row, distances in enumerate(slow_distances(query, gallery)):
        order = sorted(range(13), key=distances.__getitem__)[:5]
        assert found.indices[row].tolist() == order
        assert found.distances[row].tolist() == pytest.approx([distances[index] for index in order], abs=1e-6)


def test_a_perfect_copy_is_at_distance_zero_even_far_from_the_origin():
    gallery = torch.rand(40, 3000, generator=torch.Generator().manual_seed(0)) + 1000
    assert nearest(gallery[7:8], gallery, k=1).distances.item() == 0


def test_nearest_names_what_cannot_be_compared():
    with pytest.raises(AuditError, match="`k` must be between 1 and the number of gallery rows \\(2\\), got 3"):
        nearest(torch.zeros(1, 4), torch.zeros(2, 4), k=3)
    with pytest.raises(AuditError, match="got 4 and 5 values a row"):
        nearest(torch.zeros(1, 4), torch.zeros(2, 5), k=1)


def test_distance_ratio_by_hand():
    distances = torch.tensor([[1.0, 2.0, 3.0], [0.0, 2.0, 4.0], [3.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    assert distance_ratio(distances).tolist() == [0.5, 0.0, 1.0, 1.0]


def test_squared_distance_ratio_by_hand():
    # 1 / ((1 + 4 + 9) / 3); as the authors' code: min of squares over the mean of squares, no factor.
    assert squared_distance_ratio(torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0]])).tolist() == pytest.approx(
        [3 / 14, 0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_best_matches_over_blocks_are_the_best_of_all(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
    gallery, query = rows[:40].to(dtype), rows[40:]
    found = best_matches(query, gallery.split([3, 1, 30, 6]), 4, cosine, chunk=7)
    for row, one in enumerate(query.tolist()):
        scores = [sum(a * b for a, b in zip(one, other, strict=True)) for other in gallery.tolist()]
        order = sorted(range(40), key=scores.__getitem__, reverse=True)[:4]
        assert found.indices[row].tolist() == order
        assert found.scores[row].tolist() == pytest.approx([scores[index] for index in order], abs=1e-6)


def test_a_row_does_not_match_itself():
    rows = torch.nn.functional.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    rows[7] = rows[3]
    own = torch.tensor([3, 4, -1])
    found = best_matches(rows[[3, 4, 5]], rows.split(8), 1, cosine, own=own)
    assert found.indices[0].item() == 7
    assert found.scores[0].item() == pytest.approx(1)
    assert found.indices[1].item() != 4
    assert found.indices[2].item() == 5


def test_distinct_keeps_the_first_of_each():
    assert distinct(torch.tensor([[1, 2], [3, 4], [1, 2], [2, 1], [3, 4]])).tolist() == [0, 1, 3]


def test_find_copies_by_hand():
    gallery = torch.tensor([[0.0], [2.0], [4.0]])
    copies = find_copies(torch.tensor([[0.5], [3.0]]), gallery)
    assert copies.distance.tolist() == [0.5, 1.0]
    assert copies.ratio.tolist() == pytest.approx([0.5 / (5.5 / 3), 1 / (5 / 3)])
    assert copies.is_copy.tolist() == [True, False]
    assert copies.nearest[0] == 0


def test_fifty_nearest_are_fifty_and_the_nearest_is_one_of_them():
    gallery = torch.arange(100.0).unsqueeze(1)
    ratio = find_copies(torch.tensor([[-1.0]]), gallery).ratio.item()
    assert ratio == pytest.approx(1 / (sum(range(1, 51)) / 50))


def test_repeats_in_the_gallery_do_not_hide_a_copy():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(60, 30, generator=generator)
    gallery = torch.cat([images[:5], images[5:6].repeat(60, 1), images[6:]])
    query = images[5:6] + 0.01
    assert distance_ratio(nearest(query, gallery, k=50).distances).item() == pytest.approx(1)
    copies, plain = find_copies(query, gallery), find_copies(query, images)
    assert copies.is_copy.item()
    assert copies.nearest.item() == 5
    assert copies.ratio.item() == plain.ratio.item()


def test_a_gallery_of_one_image_is_refused():
    with pytest.raises(AuditError, match="at least 2 distinct images, got 1"):
        find_copies(torch.zeros(1, 4), torch.zeros(3, 4))


def disguise(image):
    """The image after a crop of one pixel on each side, resizing and strong JPEG compression."""
    edge = image.width
    small = image.crop((1, 1, edge - 1, edge - 1)).resize((edge, edge), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=50)
    return torch.frombuffer(bytearray(Image.open(file).convert("RGB").tobytes()), dtype=torch.uint8)


def test_planted_copies_are_found_and_unrelated_images_are_not():
    images = load_images(demo_data_path(), 64)
    gallery = as_rows(images.pixels)
    rows = choose_captions(images, 40).unique
    planted, hidden = rows[:10], rows[10:]
    disguised = torch.stack([disguise(as_image(images.pixels[row])) for row in planted]).float() / 255
    copies = find_copies(disguised, gallery)
    assert copies.is_copy.all()
    assert copies.nearest.tolist() == planted
    kept = [row for row in range(len(gallery)) if row not in hidden]
    assert not find_copies(gallery[hidden], gallery[kept]).is_copy.any()
