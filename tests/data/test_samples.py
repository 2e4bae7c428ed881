"""Reading and checking captioned images: every form of a dataset, and every fault it can have."""

import csv
import io
import json
import logging
import os
import pickle
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sd_memguard.data import hub_dataset as sample_dataset
from sd_memguard.data import image_check as sample_check
from sd_memguard.data.duplicate_report import describe_duplicates
from sd_memguard.data.samples import SampleError, Samples, load_samples

TEXTS = ["a red cat", "two blue dogs", "东京的猫"]
NAMES = ["a.png", "sub/b.jpg", "猫 ñ.webp"]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    """Keep `datasets` from writing to the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def load(folder: Path | None = None, **settings) -> Samples:
    defaults = {
        "train_data_dir": None if folder is None else str(folder),
        "dataset_name": None,
        "dataset_config_name": None,
        "cache_dir": None,
        "image_column": "image",
        "caption_column": "text",
        "max_train_samples": None,
        "seed": 0,
        "on_bad_sample": "error",
        "num_workers": 2,
        "progress": False,
    }
    return load_samples(**{**defaults, **settings})


def refusal(folder: Path | None = None, **settings) -> SampleError:
    with pytest.raises(SampleError) as caught:
        load(folder, **settings)
    return caught.value


def only_bad(folder: Path, **settings) -> tuple[int, str, str]:
    """Return the single bad sample of a folder, which both ways of treating it must agree on."""
    bad = refusal(folder, **settings).bad
    assert len(bad) == 1
    kept = load(folder, on_bad_sample="skip", **settings)
    assert kept.bad == bad
    assert bad[0].sample_id not in kept.sample_ids
    assert len(kept.sample_ids) == kept.num_rows - 1
    assert kept.sizes[bad[0].sample_id].tolist() == [0, 0]
    return bad[0]


def random_image(seed: int = 0, size: tuple[int, int] = (12, 8)) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_images(folder: Path, names=NAMES) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        random_image(seed, (12 + seed, 8)).save(folder / name)


def write_jsonl(folder: Path, rows: list, name: str = "metadata.jsonl") -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_folder(folder: Path, captions=TEXTS) -> None:
    write_images(folder)
    write_jsonl(folder, [{"file_name": name, "text": text} for name, text in zip(NAMES, captions, strict=True)])


# ------------------------------------------------------------------------------------------------- the forms it reads


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_metadata_agree_with_imagefolder_pixel_for_pixel(tmp_path, form):
    write_images(tmp_path)
    turned = PIL.Image.Exif()
    turned[PIL.Image.ExifTags.Base.Orientation] = 6
    random_image(9, (20, 10)).save(tmp_path / "turned.jpg", exif=turned)
    rows = {"file_name": [*NAMES, "turned.jpg"], "text": [*TEXTS, "a turned one"]}
    if form == "jsonl":
        write_jsonl(tmp_path, [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)])
    elif form == "csv":
        with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(rows), *zip(*rows.values(), strict=True)])
    else:
        pq.write_table(pa.table(rows), tmp_path / "metadata.parquet")

    samples = load(tmp_path)
    peer = datasets.load_dataset("imagefolder", data_files={"train": f"{tmp_path}/**"})["train"]
    assert samples.num_rows == len(peer) == 4
    assert samples.sample_ids.tolist() == [0, 1, 2, 3]
    assert samples.sample_ids.dtype == np.int64
    assert [samples.file(i) for i in range(4)] == rows["file_name"]
    for sample_id, row in enumerate(peer):
        image = samples.image(sample_id)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(row["image"].convert("RGB")))
        assert samples.captions(sample_id) == [row["text"]]
        assert samples.sizes[sample_id].tolist() == list(image.size)
    assert samples.sizes.dtype == np.int32
    assert samples.sizes[3].tolist() == [10, 20]


def test_text_files_beside_the_images_are_captions_in_the_order_of_the_paths(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_images(tmp_path, ["z.png", "B/x.y.PNG", "a.jpeg"])
    (tmp_path / "z.txt").write_bytes(b"\xef\xbb\xbfa zebra\r\n\r\n  a striped horse \n")
    (tmp_path / "B/x.y.txt").write_text("猫", encoding="utf-8")
    (tmp_path / "a.TXT").write_text("an ape")
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "._z.png").write_bytes(b"hidden")
    samples = load(tmp_path)
    assert [samples.file(i) for i in samples.sample_ids] == ["B/x.y.PNG", "a.jpeg", "z.png"]
    assert [samples.captions(i) for i in range(3)] == [["猫"], ["an ape"], ["a zebra", "a striped horse"]]
    assert "come from the .txt files" in caplog.text
    assert "1 .txt files have no image of the same name and are not used: README.txt" in caplog.text


def test_metadata_win_over_text_files(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_folder(tmp_path)
    (tmp_path / "a.txt").write_text("not this")
    assert load(tmp_path).captions(0) == [TEXTS[0]]
    assert "come from column text of metadata.jsonl" in caplog.text
    assert "1 .txt files" in caplog.text


def test_metadata_in_sub_folders_are_relative_to_themselves(tmp_path):
    write_images(tmp_path, ["x/a.png", "y/deep/b.png", "y/c.png"])
    write_jsonl(tmp_path / "y", [{"file_name": "deep\\b.png", "text": "b"}, {"file_name": "../x/a.png", "text": "c"}])
    write_jsonl(tmp_path / "x", [{"file_name": "./a.png", "text": "a"}])
    samples = load(tmp_path)
    assert [samples.file(i) for i in range(3)] == ["x/a.png", "y/deep/b.png", "x/a.png"]
    assert [samples.captions(i) for i in range(3)] == [["a"], ["b"], ["c"]]


def test_columns_may_have_other_names_and_captions_may_be_lists(tmp_path):
    write_images(tmp_path)
    write_jsonl(
        tmp_path, [{"photo_file_name": "a.png", "blip": ["one", "two"]}, "", {"photo_file_name": NAMES[2], "blip": "3"}]
    )
    samples = load(tmp_path, image_column="photo", caption_column="blip")
    assert [samples.captions(i) for i in range(2)] == [["one", "two"], ["3"]]


@pytest.mark.parametrize("as_image", [True, False])
def test_parquet_with_embedded_bytes_loads_by_dataset_name(tmp_path, as_image):
    images = [random_image(seed) for seed in range(3)]
    stored = [
        {"bytes": encoded(image), "path": path} for image, path in zip(images, ["a.png", None, "c.png"], strict=True)
    ]
    rows = {"image": stored, "text": ["a", "b", "c"], "many": [["x", "y"]] * 3}
    if as_image:
        features = datasets.Features(
            image=datasets.Image(), text=datasets.Value("string"), many=datasets.List(datasets.Value("string"))
        )
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    else:
        pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    samples = load(dataset_name=str(tmp_path))
    assert [samples.file(i) for i in range(3)] == ["a.png", "row 1", "c.png"]
    assert [samples.captions(i) for i in range(3)] == [["a"], ["b"], ["c"]]
    for sample_id, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(samples.image(sample_id)), np.asarray(image))
    assert load(dataset_name=str(tmp_path), caption_column="many").captions(2) == ["x", "y"]


def test_a_data_set_saved_to_disk_loads_by_dataset_name(tmp_path):
    dataset = datasets.Dataset.from_dict({"image": [random_image()], "text": ["a"]})
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "many")
    dataset.save_to_disk(tmp_path / "one")
    for name in ("many", "one"):
        samples = load(dataset_name=str(tmp_path / name))
        np.testing.assert_array_equal(np.asarray(samples.image(0)), np.asarray(random_image()))


def test_samples_travel_to_the_workers_of_a_data_loader(tmp_path):
    write_folder(tmp_path / "folder")
    datasets.Dataset.from_dict({"image": [random_image()], "text": ["a"]}).save_to_disk(tmp_path / "saved")
    for samples in (load(tmp_path / "folder"), load(dataset_name=str(tmp_path / "saved"))):
        copy = pickle.loads(pickle.dumps(samples))
        assert copy.captions(0) == samples.captions(0)
        np.testing.assert_array_equal(np.asarray(copy.image(0)), np.asarray(samples.image(0)))


# ------------------------------------------------------------------------------------------------------ kinds of pixels


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("LA", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG")],
)
def test_every_mode_becomes_rgb_as_pillow_converts_it(tmp_path, mode, kind):
    data = encoded(random_image().convert(mode), kind)
    (tmp_path / f"a.{kind.lower()}").write_bytes(data)
    (tmp_path / "a.txt").write_text("a")
    expected = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(load(tmp_path).image(0)), np.asarray(expected))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_greyscale_is_scaled_to_8_bits(tmp_path, kind):
    levels = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], dtype=np.uint16)
    image = PIL.Image.fromarray(levels)
    (tmp_path / ("a.pgm" if kind == "PPM" else f"a.{kind.lower()}")).write_bytes(encoded(image, kind))
    (tmp_path / "a.txt").write_text("a")
    expected = np.rint(levels / 65535 * 255)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(np.asarray(load(tmp_path).image(0)), expected)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [(np.zeros((4, 4), np.float32), "floating point"), (np.full((4, 4), 70000, np.int32), "16 bits")],
)
def test_pixels_without_a_known_range_are_bad(tmp_path, pixels, reason):
    write_folder(tmp_path)
    (tmp_path / "a.png").write_bytes(encoded(PIL.Image.fromarray(pixels), "TIFF"))
    assert reason in only_bad(tmp_path)[2]


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [PIL.Image.new("RGB", (6, 6), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.txt").write_text("a")
    assert load(tmp_path).image(0).getpixel((0, 0)) == (255, 0, 0)


# ----------------------------------------------------------------------------------------------------- the whole is bad


def test_no_data_given():
    assert "`--train_data_dir FOLDER` or `--dataset_name NAME`" in str(refusal())
    assert "no data" in str(refusal(train_data_dir="", dataset_name=""))


def test_folder_missing_or_a_file_or_empty(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped/images.zip").write_text("")
    assert "does not exist" in str(refusal(tmp_path / "nowhere"))
    assert "is a file, not a folder" in str(refusal(tmp_path / "file"))
    assert "holds no images" in str(refusal(tmp_path / "empty"))
    assert "unpack images.zip" in str(refusal(tmp_path / "zipped"))


def test_images_without_any_caption(tmp_path):
    write_images(tmp_path)
    assert "holds 3 images, but no captions" in str(refusal(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["metadata.json", "metadata.json1", "Metadata.JSONL", "metadata.jsonl.txt", "metadata.tsv", "captions.jsonl"],
)
def test_metadata_under_a_wrong_name_are_pointed_out(tmp_path, name, caplog):
    write_images(tmp_path)
    write_jsonl(tmp_path, [{"file_name": "a.png", "text": "a"}], name)
    message = str(refusal(tmp_path))
    assert f"found `{name}`" in message
    assert "metadata.jsonl" in message
    for image in NAMES:
        (tmp_path / image).with_suffix(".txt").write_text("a")
    load(tmp_path)
    assert name in caplog.text


def test_a_folder_of_parquet_is_sent_to_dataset_name(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "train-00000.parquet")
    assert f"`--dataset_name {tmp_path}`" in str(refusal(tmp_path))


def test_unknown_columns_are_listed_with_the_nearest(tmp_path):
    write_images(tmp_path)
    write_jsonl(tmp_path, [{"file_name": name, "caption": "a"} for name in NAMES])
    error = refusal(tmp_path, caption_column="captions")
    assert "(file_name, caption), got captions; did you mean `caption`?" in str(error)
    assert error.bad == []
    assert "`--image_column` must be one of the data's columns (image)" in str(refusal(tmp_path, image_column="photo"))
    write_jsonl(tmp_path, [{"name": "a.png", "text": "a"}])
    assert "needs a column `file_name`, found: name, text" in str(refusal(tmp_path))


def test_metadata_of_two_kinds_or_without_rows_or_damaged(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    assert "metadata.csv, metadata.jsonl" in str(refusal(tmp_path))
    (tmp_path / "metadata.jsonl").unlink()
    assert "metadata.csv holds no rows" in str(refusal(tmp_path))
    (tmp_path / "metadata.csv").write_text(f'file_name,text\na.png,"{"x" * 200_000}"\n')
    assert "is not valid CSV" in str(refusal(tmp_path))
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    assert "cannot be read as Parquet" in str(refusal(tmp_path))
    whole = io.BytesIO()
    pq.write_table(pa.table({"file_name": NAMES, "text": TEXTS}), whole, store_schema=False)
    (tmp_path / "metadata.parquet").write_bytes(whole.getvalue().replace(b"file_name", b"file_\xbfame"))
    assert "cannot be read as Parquet" in str(refusal(tmp_path))


def test_data_sets_without_the_split_or_column_or_kind(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [random_image()], "text": ["a"], "label": [1]})
    datasets.DatasetDict(test=rows, validation=rows).save_to_disk(tmp_path / "no_train")
    rows.save_to_disk(tmp_path / "train")
    name = str(tmp_path / "train")
    assert "needs a split `train`, found: test, validation" in str(refusal(dataset_name=str(tmp_path / "no_train")))
    assert "did you mean `text`?" in str(refusal(dataset_name=name, caption_column="texts"))
    assert "(image, text, label)" in str(refusal(dataset_name=name, image_column="photo"))
    assert "must name a column of texts, got label" in str(refusal(dataset_name=name, caption_column="label"))
    assert "must name a column of images, got text" in str(refusal(dataset_name=name, image_column="text"))


def test_a_damaged_data_set_cannot_be_loaded(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    error = refusal(dataset_name=str(tmp_path))
    assert f"`--dataset_name` {tmp_path} cannot be loaded" in str(error)
    assert "Parquet" in str(error)


def test_streaming_data_sets_are_refused_by_name(monkeypatch):
    streamed = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}]))
    for loaded in (streamed, datasets.IterableDatasetDict(train=streamed)):
        monkeypatch.setattr(sample_dataset.datasets, "load_dataset", lambda *args, loaded=loaded, **settings: loaded)
        assert f"is a streaming dataset ({type(loaded).__name__})" in str(refusal(dataset_name="org/stream"))


# ------------------------------------------------------------------------------------------------- single bad samples


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "has no caption"),
        ("", "caption is empty"),
        (" \t\n", "caption is empty"),
        (7, "must be a text or a list of texts, got int 7"),
        ({"en": "a"}, "got dict"),
        ([], "list of captions is empty"),
        (["a", " "], "caption 2 of 2: caption is empty"),
        ([None], "caption 1 of 1: must be a text, got None"),
    ],
)
def test_bad_captions_are_named_by_file_and_line(tmp_path, caption, reason):
    write_folder(tmp_path, [TEXTS[0], caption, TEXTS[2]])
    sample_id, file, found = only_bad(tmp_path)
    assert (sample_id, file) == (1, "sub/b.jpg")
    assert reason in found
    assert "(`text`, metadata.jsonl line 2)" in found


def test_bad_captions_of_a_data_set_are_named(tmp_path):
    stored = [{"bytes": encoded(random_image()), "path": None}] * 4
    datasets.Dataset.from_dict({"image": stored, "text": ["a", None, " ", "b"]}).to_parquet(tmp_path / "rows.parquet")
    error = refusal(dataset_name=str(tmp_path))
    assert error.bad == [(1, "row 1", "has no caption"), (2, "row 2", "caption is empty")]


def test_bad_images_of_a_data_set_are_named(tmp_path):
    stored = [{"bytes": encoded(random_image()), "path": None}, {"bytes": b"no image", "path": "b.png"}, None]
    rows = {"image": stored, "text": ["a", "b", "c"]}
    features = datasets.Features(image=datasets.Image(decode=False), text=datasets.Value("string"))
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path)
    bad = refusal(dataset_name=str(tmp_path)).bad
    assert [(one.sample_id, one.file) for one in bad] == [(1, "b.png"), (2, "row 2")]
    assert "Pillow can read" in bad[0].reason
    assert "has no image" in bad[1].reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "not valid JSON"),
        ('["a.png", "a"]', "must be a JSON object on one line, got list"),
        ("[" * 100_000, "not valid JSON"),
        ('{"text": "no file"}', "`file_name` must name an image, got None"),
        ('{"file_name": 3, "text": "a"}', "got 3"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, reason):
    write_images(tmp_path)
    write_jsonl(tmp_path, [{"file_name": "a.png", "text": "a"}, line])
    sample_id, file, found = only_bad(tmp_path)
    assert (sample_id, file) == (1, "metadata.jsonl line 2")
    assert reason in found


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    write_images(tmp_path)
    lines = ['{"file_name": "a.png", "text": "fine"}', '{"file_name": "sub/b.jpg", "text": "caf\xe9"}']
    (tmp_path / "metadata.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    assert "caption is not valid UTF-8" in only_bad(tmp_path)[2]
    (tmp_path / "metadata.jsonl").unlink()
    invalid = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"file_name": ["a.png", "sub/b.jpg"], "text": invalid}), tmp_path / "metadata.parquet")
    sample_id, file, reason = only_bad(tmp_path)
    assert (sample_id, file) == (1, "sub/b.jpg")
    assert "caption is not valid UTF-8" in reason
    (tmp_path / "metadata.parquet").unlink()
    for name, text in zip(NAMES, ["caf\xe9", "b", "c"], strict=True):
        (tmp_path / name).with_suffix(".txt").write_bytes(text.encode("latin-1"))
    assert only_bad(tmp_path)[0] == 0


def test_a_comma_outside_quotes_is_named(tmp_path):
    write_images(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"a, b"\nsub/b.jpg,a, b\n', encoding="utf-8")
    sample_id, file, reason = only_bad(tmp_path)
    assert (sample_id, file) == (1, "metadata.csv line 3")
    assert "3 fields under 2 columns" in reason
    assert load(tmp_path, on_bad_sample="skip").captions(0) == ["a, b"]


def test_a_short_csv_row_has_no_caption(tmp_path):
    write_images(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,1\nsub/b.jpg\n")
    assert only_bad(tmp_path)[2] == "has no caption (`text`, metadata.csv line 3)"
    assert load(tmp_path, on_bad_sample="skip").captions(0) == ["1"]


@pytest.mark.parametrize(
    "name", ["/etc/a.png", "C:\\a.png", "../a.png", "sub/../../a.png", "..\\a.png", ".", "file:///a.png", "a\0.png"]
)
def test_paths_that_leave_the_data_folder_are_bad(tmp_path, name):
    random_image().save(tmp_path / "a.png")
    folder = tmp_path / "data"
    write_images(folder)
    write_jsonl(folder, [{"file_name": "a.png", "text": "a"}, {"file_name": name, "text": "b"}])
    sample_id, file, reason = only_bad(folder)
    assert (sample_id, file) == (1, "metadata.jsonl line 2")
    assert "inside the data folder" in reason


def test_links_that_leave_the_data_folder_are_bad(tmp_path, caplog):
    random_image().save(tmp_path / "a.png")
    folder = tmp_path / "data"
    write_images(folder, ["a.png", "b.png"])
    (folder / "inside.png").symlink_to("b.png")
    (folder / "outside.png").symlink_to(tmp_path / "a.png")
    (folder / "linked").symlink_to(tmp_path)
    for name in ("a", "b", "inside", "outside"):
        (folder / f"{name}.txt").write_text("a")
    sample_id, file, reason = only_bad(folder)
    assert (sample_id, file) == (3, "outside.png")
    assert "leaves the data folder" in reason
    assert "Linked folders are not searched for images: linked" in caplog.text
    names = ["a.png", "inside.png", "linked/a.png"]
    write_jsonl(folder, [{"file_name": name, "text": "a"} for name in names])
    assert only_bad(folder)[:2] == (2, "linked/a.png")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "a.txt"])
def test_captions_are_not_read_through_a_link_that_leaves_the_data_folder(tmp_path, name):
    outside = tmp_path / "secrets.txt"
    outside.write_text("file_name,text\na.png,the password\n")
    folder = tmp_path / "data"
    folder.mkdir()
    random_image().save(folder / "a.png")
    random_image().save(folder / "b.png")
    (folder / "b.txt").write_text("a caption")
    (folder / name).symlink_to(outside)
    error = refusal(folder)
    assert f"{name} is a link that leaves the data folder" in str(error)
    assert "password" not in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["metadata.jsonl", "a.txt", "a.png"])
def test_a_pipe_in_the_data_folder_is_named_and_not_waited_for(tmp_path, name):
    for image in ("a.png", "b.png"):
        random_image().save(tmp_path / image)
        (tmp_path / f"{image[0]}.txt").write_text("a caption")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    script = "import sys; from tests.data.test_samples import refusal; print(refusal(sys.argv[1]))"
    told = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120, capture_output=True, text=True)
    assert "is not a file" in told.stdout, told.stderr


def test_links_of_the_hub_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "datasets--a--b/blobs", tmp_path / "datasets--a--b/snapshots/0123"
    write_images(blobs, ["abcdef.png"])
    snapshot.mkdir(parents=True)
    (snapshot / "a.png").symlink_to("../../blobs/abcdef.png")
    write_jsonl(snapshot, [{"file_name": "a.png", "text": "a"}])
    assert load(snapshot).file(0) == "a.png"


def test_listed_but_missing_and_present_but_not_listed(tmp_path, caplog):
    write_images(tmp_path, [f"{i}.png" for i in range(8)])
    (tmp_path / "folder.png").mkdir()
    names = ["0.png", "gone.png", "folder.png", "x" * 300 + ".png"]
    write_jsonl(tmp_path, [{"file_name": name, "text": "a"} for name in names])
    bad = refusal(tmp_path).bad
    assert [one.file for one in bad] == names[1:]
    assert [one.reason for one in bad[:2]] == ["is listed, but there is no such file", "is not a file"]
    assert "cannot be read" in bad[2].reason
    assert (
        "7 images are not listed in the metadata and are not used: 1.png, 2.png, 3.png, 4.png, 5.png, ..."
        in caplog.text
    )


def test_images_without_a_text_file(tmp_path):
    write_images(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub/b.txt").write_text(" \n")
    bad = refusal(tmp_path).bad
    assert bad == [
        (1, "sub/b.jpg", "caption is empty (sub/b.txt)"),
        (2, "猫 ñ.webp", "has no caption: 猫 ñ.txt is missing"),
    ]


def test_names_match_however_accents_are_composed(tmp_path):
    write_images(tmp_path, [unicodedata.normalize("NFD", "é.png")])
    write_jsonl(tmp_path, [{"file_name": unicodedata.normalize("NFC", "é.png"), "text": "a"}])
    assert load(tmp_path).sample_ids.tolist() == [0]


def test_a_file_name_that_is_not_utf8_is_named(tmp_path):
    write_images(tmp_path, ["a.png"])
    (tmp_path / "a.txt").write_text("a")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/z\xe9.png")).write_bytes(b"")
    except OSError:
        return  # this file system keeps no such names
    assert only_bad(tmp_path) == (1, "z\\udce9.png", "file name is not valid UTF-8; rename it")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty (0 bytes)"),
        (b"hello", "Pillow can read"),
        (encoded(random_image(size=(64, 64)))[:2000], "cannot be decoded"),
        (encoded(random_image(size=(64, 64)), "JPEG")[:1000], "truncated"),
    ],
)
def test_unreadable_images_are_named(tmp_path, data, reason):
    write_folder(tmp_path)
    (tmp_path / "sub/b.jpg").write_bytes(data)
    sample_id, file, found = only_bad(tmp_path)
    assert (sample_id, file) == (1, "sub/b.jpg")
    assert reason in found
    assert str(tmp_path) not in found
    assert " at 0x" not in found


def test_decompression_bombs_are_named(tmp_path, monkeypatch):
    write_folder(tmp_path)
    random_image(size=(64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    assert "too many pixels" in only_bad(tmp_path)[2]


# ------------------------------------------------------------------------------------------------------- bad and chosen


def test_every_bad_sample_is_kept_and_the_first_20_are_told_with_all_their_faults(tmp_path):
    write_images(tmp_path, [f"{i:02}.png" for i in range(30)])
    (tmp_path / "05.png").write_bytes(b"")
    write_jsonl(tmp_path, [{"file_name": f"{i:02}.png", "text": "a" if i < 5 else None} for i in range(30)])
    error = refusal(tmp_path)
    assert [one.sample_id for one in error.bad] == list(range(5, 30))
    assert "25 of 30 samples cannot be used" in str(error)
    assert "and 5 more" in str(error)
    assert "24.png" in str(error)
    assert "25.png" not in str(error)
    assert error.bad[0].reason == "has no caption (`text`, metadata.jsonl line 6); image is empty (0 bytes)"
    assert "`--on_bad_sample skip`" in str(error)


def test_skipping_keeps_the_ids_of_the_rest_and_says_how_many(tmp_path, caplog):
    write_folder(tmp_path, ["a", "", "c"])
    samples = load(tmp_path, on_bad_sample="skip")
    assert samples.sample_ids.tolist() == [0, 2]
    assert samples.num_rows == 3
    assert samples.captions(2) == ["c"]
    assert "1 of 3 samples cannot be used" in caplog.text


def test_all_bad_is_an_error_even_when_skipping(tmp_path):
    write_folder(tmp_path, ["", "", ""])
    assert "No sample is left" in str(refusal(tmp_path, on_bad_sample="skip"))


def test_max_train_samples_draws_the_rows_of_upstream(tmp_path, caplog):
    write_images(tmp_path, [f"{i:02}.png" for i in range(20)])
    write_jsonl(tmp_path, [{"file_name": f"{i:02}.png", "text": str(i)} for i in range(20)])
    peer = datasets.Dataset.from_dict({"row": list(range(20))}).shuffle(seed=42).select(range(7))
    samples = load(tmp_path, max_train_samples=7, seed=42)
    assert samples.sample_ids.tolist() == sorted(peer["row"])
    assert samples.num_rows == len(samples.sizes) == 20
    assert [samples.captions(i) for i in samples.sample_ids] == [[str(i)] for i in samples.sample_ids]
    assert "`--max_train_samples`" not in caplog.text
    assert load(tmp_path, max_train_samples=21).sample_ids.tolist() == list(range(20))
    assert "`--max_train_samples` is 21, but there are 20 samples" in caplog.text
    assert "at least 1, got 0" in str(refusal(tmp_path, max_train_samples=0))


def test_rows_that_are_not_drawn_are_not_checked(tmp_path):
    write_folder(tmp_path, ["a", "", "c"])
    for seed in range(10):
        drawn = set(np.random.default_rng(seed).permutation(3)[:2].tolist())
        if 1 in drawn:
            assert [one.sample_id for one in refusal(tmp_path, max_train_samples=2, seed=seed).bad] == [1]
        else:
            assert load(tmp_path, max_train_samples=2, seed=seed).sample_ids.tolist() == [0, 2]


def test_a_image_removed_after_the_check_is_named(tmp_path):
    write_folder(tmp_path)
    samples = load(tmp_path)
    (tmp_path / "sub/b.jpg").unlink()
    with pytest.raises(SampleError, match=r"sample 1, sub/b.jpg, was changed after the check"):
        samples.image(1)


# --------------------------------------------------------------------------------------------------------------- damage


def damaged(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 3, 30])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def decodes(data: bytes) -> bool:
    try:
        datasets.Image().decode_example({"path": None, "bytes": data}).convert("RGB")
    except Exception:
        return False
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_images_are_named_exactly_where_they_do_not_decode(tmp_path):
    rng = random.Random(0)
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 3
    originals = [
        *(encoded(random_image(size=(24, 16)), kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP", "TIFF")),
        *(encoded(random_image(size=(24, 16)), kind) for kind in ("GIF", "BMP", "PPM")),
    ]
    variants = [damaged(originals[i % len(originals)], rng) for i in range(300)]
    for i, data in enumerate(variants):
        (tmp_path / f"{i:03}.png").write_bytes(data)
        (tmp_path / f"{i:03}.txt").write_text("a")
    undecodable = [i for i, data in enumerate(variants) if not decodes(data)]
    assert 50 < len(undecodable) < 250
    samples = load(tmp_path, on_bad_sample="skip")
    assert [one.sample_id for one in samples.bad] == undecodable
    for sample_id in samples.sample_ids:
        assert samples.image(sample_id).size == tuple(samples.sizes[sample_id])


def test_damaged_metadata_never_surprise(tmp_path):
    rng = random.Random(1)
    write_images(tmp_path)
    rows = {"file_name": NAMES, "text": TEXTS}
    parquet = io.BytesIO()
    pq.write_table(pa.table(rows), parquet)
    lines = [json.dumps({"file_name": n, "text": t}, ensure_ascii=False) for n, t in zip(NAMES, TEXTS, strict=True)]
    table = "\n".join(["file_name,text", *(f'"{n}","{t}"' for n, t in zip(NAMES, TEXTS, strict=True))])
    for kind, data in {
        "jsonl": "\n".join(lines).encode(),
        "csv": table.encode(),
        "parquet": parquet.getvalue(),
    }.items():
        path = tmp_path / f"metadata.{kind}"
        for _ in range(60):
            path.write_bytes(damaged(data, rng))
            try:
                samples = load(tmp_path, on_bad_sample="skip")
            except SampleError:
                continue
            assert all(samples.captions(i) and samples.image(i) for i in samples.sample_ids)
        path.unlink()


# ---------------------------------------------------------------------------------------------------------- duplicates


@pytest.fixture
def repeated(tmp_path) -> Path:
    """Return a folder of 8 images: 1, 4 and 6 are one, also smaller and as JPEG; 2 and 7 are one; 3 is broken."""
    names = ["0.png", "1.png", "2.png", "3.png", "4.jpg", "5.png", "6.png", "7.png"]
    for seed, name in enumerate(names):
        random_image(seed, (6, 6)).resize((90, 60), PIL.Image.Resampling.BICUBIC).save(tmp_path / name)
    with PIL.Image.open(tmp_path / "1.png") as original:
        original.save(tmp_path / "4.jpg", quality=70)
        original.resize((45, 30)).save(tmp_path / "6.png")
    (tmp_path / "7.png").write_bytes((tmp_path / "2.png").read_bytes())
    (tmp_path / "3.png").write_bytes(b"no image")
    write_jsonl(tmp_path, [{"file_name": name, "text": f"caption {name[0]}"} for name in names])
    return tmp_path


def test_duplicates_are_grouped_under_their_first_sample(repeated):
    samples = load(repeated, on_bad_sample="skip", find_duplicates=True)
    assert samples.groups.tolist() == [0, 1, 2, 3, 1, 5, 1, 2]
    assert load(repeated, on_bad_sample="skip").groups is None
    few = load(repeated, on_bad_sample="skip", find_duplicates=True, max_train_samples=6, seed=1)
    firsts = {image: min(i for i in few.sample_ids if samples.groups[i] == image) for image in (1, 2)}
    expected = [firsts.get(samples.groups[i], i) if i in few.sample_ids else i for i in range(8)]
    assert few.groups.tolist() == expected
    assert expected != list(range(8))


def test_looking_for_duplicates_decodes_nothing_twice(repeated, monkeypatch):
    decoded = []
    decode = sample_check.decode_image

    def count(stored):
        decoded.append(stored["path"])
        return decode(stored)

    monkeypatch.setattr(sample_check, "decode_image", count)
    load(repeated, on_bad_sample="skip", find_duplicates=True)
    assert len(decoded) == len(set(decoded)) == 8


def test_the_largest_groups_are_told_by_name(repeated):
    text = describe_duplicates(load(repeated, on_bad_sample="skip", find_duplicates=True))
    assert text.splitlines() == [
        "2 groups of near-identical images hold 5 samples of 7; the largest:",
        "  3 times: 1.png 'caption 1', 4.jpg 'caption 4', 6.png 'caption 6'",
        "  2 times: 2.png 'caption 2', 7.png 'caption 7'",
    ]


def test_a_set_without_duplicates_says_so(tmp_path):
    write_folder(tmp_path)
    assert describe_duplicates(load(tmp_path, find_duplicates=True)) == "no near-identical images were found"
