import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd_memguard.audit import AuditError
from sd_memguard.audit.collection import read_dataset, read_folder, without
from sd_memguard.data.samples import load_samples

ROWS = [("b.png", "a caption, with a comma"), ("a.png", "another"), ("b.png", "a caption, with a comma")]


def write_images(folder):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "b.png")
    Image.new("RGB", (8, 8), (0, 0, 51)).save(folder / "a.png")


def write_jsonl(folder):
    lines = [json.dumps({"file_name": name, "text": [text, "other"]}) for name, text in ROWS]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def write_csv(folder):
    lines = [f'{name},"{text}"' for name, text in ROWS]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]), encoding="utf-8")


def write_parquet(folder):
    columns = {"file_name": [name for name, _ in ROWS], "text": [text for _, text in ROWS]}
    pq.write_table(pa.table(columns), folder / "metadata.parquet")


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_metadata_give_rows_in_order_repeats_included(tmp_path, write):
    write_images(tmp_path)
    write(tmp_path)
    images = read_folder(tmp_path, "--train_data_dir")
    assert list(zip(images.files, images.captions, strict=True)) == ROWS
    assert images.distinct == [0, 1]
    assert images.hashes[0] == images.hashes[2] != images.hashes[1]
    assert images.image(1).getpixel((3, 3)) == (0, 0, 51)


def test_text_files_give_captions_and_folders_are_searched(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for folder in (tmp_path / "sub", tmp_path / ".hidden", tmp_path):
        write_images(folder)
        for name in "ab":
            (folder / f"{name}.txt").write_text(f"\n caption {name} \nsecond\n")
    images = read_folder(tmp_path, "--train_data_dir")
    assert list(images.files) == ["a.png", "b.png", "sub/a.png", "sub/b.png"]
    assert list(images.captions) == ["caption a", "caption b"] * 2
    assert images.distinct == [0, 1]


def test_data_set_is_read_by_row(tmp_path):
    write_images(tmp_path)
    files = [str(tmp_path / name) for name, _ in ROWS]
    columns = {"photo": files, "words": [[text, "other"] for _, text in ROWS]}
    datasets.Dataset.from_dict(columns).cast_column("photo", datasets.Image()).save_to_disk(tmp_path / "saved")
    images = read_dataset(str(tmp_path / "saved"), "photo", "words")
    assert list(images.captions) == [text for _, text in ROWS]
    assert list(images.files) == ["00000000.png", "00000001.png", "00000002.png"]
    assert images.distinct == [0, 1]
    assert images.image(0).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(AuditError, match=r"columns `image` and `words`, found \['photo', 'words'\]"):
        read_dataset(str(tmp_path / "saved"), "image", "words")
    with pytest.raises(AuditError, match="cannot be loaded"):
        read_dataset(str(tmp_path / "nothing"), "image", "text")


def test_transparency_lies_on_white_and_photos_stand_upright(tmp_path):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    turned = Image.new("RGB", (16, 8), "black")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    images = read_folder(tmp_path, "--images", needs_captions=False)
    assert images.image(0).getpixel((0, 0)) == (255, 255, 255)
    assert images.image(1).size == (8, 16)
    assert list(images.captions) == ["", ""]


def test_known_images_are_taken_out(tmp_path):
    write_images(tmp_path)
    write_jsonl(tmp_path)
    images = read_folder(tmp_path, "--reference_data_dir")
    left = without(images, {images.hashes[0]})
    assert list(left.files) == ["a.png"]
    assert left.image(0).getpixel((0, 0)) == (0, 0, 51)


def test_what_cannot_be_read_is_named(tmp_path):
    def refuse(message, **options):
        with pytest.raises(AuditError, match=message):
            _ = read_folder(tmp_path, "--train_data_dir", **options).hashes

    with pytest.raises(AuditError, match=r"`--images` .* is not a folder"):
        read_folder(tmp_path / "nothing", "--images")
    refuse("holds no images")
    write_images(tmp_path)
    refuse(r"a.png in .* has no caption; .* \(and 1 more\)")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "x"}')
    refuse("row 1 .* must have a caption as `text`, it has \\['caption', 'file_name'\\]")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "../a.png", "text": "x"}')
    refuse("lists ../a.png, which lies outside")
    (tmp_path / "metadata.jsonl").write_text('{"text": "x"}')
    refuse("must name an image as `file_name`")
    (tmp_path / "metadata.jsonl").write_text("[1]")
    refuse("row 1 .* must name an image as `file_name`, it has \\[\\]")
    (tmp_path / "metadata.jsonl").write_text("{")
    refuse("row 1 .* must name an image")
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in ("a.png", "broken.png", "missing.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    refuse("2 of 3 images .* cannot be used: broken.png: .*; missing.png: .*--on_bad_sample skip")


def test_what_training_has_skipped_is_passed_over_and_rows_keep_their_numbers(tmp_path, caplog):
    write_images(tmp_path)
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-30])  # its header is whole
    names = ["a.png", "broken.png", "b.png", "b.png", "../a.png", "cut.png"]
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines = [json.dumps({"file_name": name, "text": "" if row == 2 else "x"}) for row, name in enumerate(names)]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, "no JSON"]))
    images = read_folder(tmp_path, "--train_data_dir", on_bad_sample="skip")
    assert images.distinct == [0, 3]
    assert [bool(content) for content in images.hashes] == [True, False, False, True, False, False, False]
    assert "5 of 7 images" in caplog.text
    samples = load_samples(
        train_data_dir=str(tmp_path),
        dataset_name=None,
        dataset_config_name=None,
        cache_dir=None,
        image_column="image",
        caption_column="text",
        max_train_samples=None,
        seed=0,
        on_bad_sample="skip",
        progress=False,
    )
    assert samples.sample_ids.tolist() == images.distinct
