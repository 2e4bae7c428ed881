"""Broken images and captions of every kind: never a traceback, never a hang, every bad sample named."""

import io
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sd_memguard.data.samples import SampleError, Samples, load_samples

FORMATS = {"PNG": "RGBA", "JPEG": "RGB", "GIF": "P", "WEBP": "RGB", "BMP": "RGB", "TIFF": "I;16"}
NUM_MUTATIONS = 1000


def load(folder: Path, on_bad_sample: str = "skip"):
    return load_samples(
        train_data_dir=str(folder),
        dataset_name=None,
        dataset_config_name=None,
        cache_dir=None,
        image_column="image",
        caption_column="text",
        max_train_samples=None,
        seed=0,
        on_bad_sample=on_bad_sample,
        progress=False,
    )


def encoded(name: str, mode: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, name)
    return buffer.getvalue()


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """Return the file cut, with some bytes changed, with a part missing or doubled, or with something else appended."""
    data = bytearray(content)
    place, length = int(random.integers(len(data))), int(random.integers(1, 40))
    match int(random.integers(5)):
        case 0:
            del data[place:]
        case 1:
            for position in random.integers(len(data), size=length):
                data[position] = random.integers(256)
        case 2:
            del data[place : place + length]
        case 3:
            data[place:place] = data[place : place + length]
        case _:
            header = 32  # sizes, modes and offsets are here
            for position in random.integers(min(header, len(data)), size=3):
                data[position] = random.integers(256)
    return bytes(data)


def decodes(file: Path) -> bool:
    """Say whether Pillow, asked directly, makes an image of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                image.load()
                return 0 not in image.size
    except Exception:
        return False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mutated_images_are_decoded_or_named(tmp_path):
    random = np.random.default_rng(1)
    good = {name: encoded(name, mode) for name, mode in FORMATS.items()}
    rows = []
    for number in range(NUM_MUTATIONS):
        name = list(good)[number % len(good)]
        file = tmp_path / f"{number:04}.{name.lower()}"
        file.write_bytes(mutated(good[name], random))
        rows.append(json.dumps({"file_name": file.name, "text": "an image"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    samples = load(tmp_path)
    named = {one.file for one in samples.bad}
    kept = {samples.file(sample_id) for sample_id in samples.sample_ids.tolist()}
    assert len(named) + len(kept) == NUM_MUTATIONS
    assert all(one.reason.strip() for one in samples.bad)
    assert NUM_MUTATIONS // 10 < len(named) < NUM_MUTATIONS  # both kinds are met
    assert [file for file in sorted(kept) if not decodes(tmp_path / file)] == []
    for sample_id in samples.sample_ids.tolist():
        assert samples.image(sample_id).mode == "RGB"


def read_or_refused(folder: Path) -> Samples | None:
    """Return the samples, or None where they are refused in words; any other error comes through."""
    try:
        return load(folder)
    except SampleError as error:
        message = str(error)
    assert message.strip()
    return None


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FILE_NAMES = st.sampled_from(
    ["a.png", "b.png", "../a.png", "/etc/passwd", "a.png/", ".", "", "c\x00.png", "sub/../a.png"]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("captions")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(made / name)
    return made


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(FILE_NAMES | ANYTHING, ANYTHING | st.just("a caption")), min_size=1, max_size=5))
def test_any_metadata_are_read_or_refused(folder, rows):
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    samples = read_or_refused(folder)
    if samples is None:
        return
    assert len(samples.sample_ids) + len(samples.bad) == samples.num_rows
    for sample_id in samples.sample_ids.tolist():
        assert rows[sample_id][0] in {"a.png", "b.png", "a.png/", "sub/../a.png"}
        assert all(caption.strip() for caption in samples.captions(sample_id))


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.binary(max_size=300))
def test_any_bytes_as_metadata_are_read_or_refused(folder, text):
    (folder / "metadata.jsonl").write_bytes(text)
    read_or_refused(folder)


def test_harmful_captions_are_only_text(tmp_path, run, caplog):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    captions = ["<script>alert(1)</script>", "\x1b[2J\x1b[31mred", "x" * 1_000_000, "{{ 7 * 7 }}", "$(touch owned)"]
    rows = [json.dumps({"file_name": "a.png", "text": caption}) for caption in captions]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with caplog.at_level(logging.INFO, "sd_memguard"):
        result = run(train_data_dir=str(tmp_path), max_train_steps=12, num_shards=1)
    assert "\x1b" not in caplog.text
    assert max(map(len, caplog.text.splitlines())) < 1000
    assert not list(Path().glob("owned"))
    assert result.global_step == 12
