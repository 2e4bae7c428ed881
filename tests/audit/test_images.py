import json

import pytest
import torch
from PIL import Image

from sd_memguard.audit import AuditError
from sd_memguard.audit.images import as_image, as_rows, load_images


def write_folder(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_images_come_in_the_order_of_the_metadata_repeats_included(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "b.png")
    Image.new("RGB", (8, 8), (0, 0, 51)).save(tmp_path / "a.png")
    names = ["b.png", "a.png", "b.png"]
    write_folder(tmp_path, [{"file_name": name, "text": f"no. {index}"} for index, name in enumerate(names)])
    images = load_images(tmp_path, 8)
    assert images.files == names
    assert images.captions == ["no. 0", "no. 1", "no. 2"]
    assert images.pixels.shape == (3, 8, 8, 3)
    assert images.pixels[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 51], [255, 0, 0]]
    assert torch.equal(as_rows(images.pixels)[1].unflatten(0, (8, 8, 3))[3, 3], torch.tensor([0, 0, 0.2]))


def test_images_of_the_asked_size_are_taken_pixel_for_pixel(tmp_path):
    noise = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    as_image(noise).save(tmp_path / "noise.png")
    write_folder(tmp_path, [{"file_name": "noise.png", "text": "noise"}])
    assert torch.equal(load_images(tmp_path, 16).pixels[0], noise)


def test_other_sizes_are_cropped_at_the_center(tmp_path):
    wide = Image.new("RGB", (40, 10), "black")
    wide.paste("white", (15, 0, 25, 10))
    wide.save(tmp_path / "wide.png")
    write_folder(tmp_path, [{"file_name": "wide.png", "text": "a white square"}])
    assert (load_images(tmp_path, 10).pixels == 255).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "must hold a metadata.jsonl"),
        ([], "must name at least one image"),
        ([{"file_name": "a.png", "caption": "a"}], "row 1 of .* must have `text`, it has \\['caption', 'file_name'\\]"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, rows, message):
    if rows is not None:
        write_folder(tmp_path, rows)
    with pytest.raises(AuditError, match=message):
        load_images(tmp_path, 8)
