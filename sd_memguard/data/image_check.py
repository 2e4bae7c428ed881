"""What makes a sample usable: a caption with words in it and an image that decodes."""

import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
from tqdm.auto import tqdm

from sd_memguard.core.duplicates import make_thumbnail
from sd_memguard.data.image_check_cache import CheckCache, GoodImage
from sd_memguard.errors import UserError

_MAX_LISTED = 20
_ROWS_PER_TASK, _MAX_TASKS = 32, 20_000
_MAX_16_BIT = 65535


class BadSample(NamedTuple):
    """One sample that cannot be trained on, and why."""

    sample_id: int
    file: str
    reason: str


class SampleError(UserError):
    """The captioned images cannot be used as they are.

    Attributes:
        bad: every bad sample, also those that the message does not name; empty where no single sample is at fault.
    """

    def __init__(self, message: str, bad: Sequence[BadSample] = ()) -> None:
        """Keep the bad samples beside the message."""
        super().__init__(message)
        self.bad = list(bad)


class ImageError(ValueError):
    """A single image cannot be read; the message continues a sentence that begins with its name."""


class Images(Protocol):
    """Stored images by row number, in the form that `datasets.Image` decodes."""

    def read(self, row: int) -> Mapping[str, object]:
        """Return the image's `bytes` and `path`, or raise ImageError."""

    def read_mask(self, row: int) -> Mapping[str, object] | None:
        """Return the same of the file of its mask, None where there is none."""


def bad_samples_message(name: str, bad: Sequence[BadSample], num_samples: int, advice: str) -> str:
    """Return a text that names the first 20 bad samples, counts the rest and ends with the advice."""
    lines = [f"{name}: {len(bad)} of {num_samples} samples cannot be used"]
    lines += [f"  sample {one.sample_id}, {one.file}: {one.reason}" for one in bad[:_MAX_LISTED]]
    if len(bad) > _MAX_LISTED:
        lines.append(f"  and {len(bad) - _MAX_LISTED} more")
    return "\n".join([*lines, advice])


def printable(text: str) -> str:
    """Return the text with what UTF-8 cannot hold (bytes of another encoding in a file name) written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_unicode(text: str) -> bool:
    """Return whether the text came from valid UTF-8: undecodable bytes are read as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def caption_fault(value: object) -> str:
    """Return why this is no caption or list of captions, or an empty string if it is one."""
    if value is None:
        return "has no caption"
    if isinstance(value, str):
        return _text_fault(value)
    if not isinstance(value, list):
        return f"caption must be a text or a list of texts, got {type(value).__name__} {shortened(value)}"
    if not value:
        return "list of captions is empty"
    faults = ((position, _member_fault(member)) for position, member in enumerate(value, start=1))
    return next((f"caption {position} of {len(value)}: {fault}" for position, fault in faults if fault), "")


def _member_fault(value: object) -> str:
    return _text_fault(value) if isinstance(value, str) else f"must be a text, got {shortened(value)}"


def _text_fault(text: str) -> str:
    if not text.strip():
        return "caption is empty"
    return "" if is_unicode(text) else f"caption is not valid UTF-8: {shortened(text)}"


def shortened(value: object) -> str:
    """Return a value as it would be written in code, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def content_key(stored: Mapping[str, object]) -> bytes:
    """Return the hash of a stored image's bytes, 16 bytes."""
    content = stored["bytes"]
    if content is None:
        content = Path(str(stored["path"])).read_bytes()
    assert isinstance(content, bytes)
    return hashlib.blake2b(content, digest_size=16).digest()


def decode_image(stored: Mapping[str, object]) -> PIL.Image.Image:
    """Return a stored image in RGB, turned upright by its EXIF tag: what `datasets` decodes, in 8 bits.

    Alpha is dropped and the first frame of an animation is taken, as `convert("RGB")` does. Pillow clips 16-bit
    greyscale at 255, which makes it white; here its range is scaled to 8 bits.

    Raises:
        ImageError: whatever is wrong with the bytes.
    """
    if stored["bytes"] == b"":
        raise ImageError("image is empty (0 bytes)")
    try:
        return _to_rgb(open_image(stored))
    except ImageError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise ImageError("is not an image that Pillow can read; convert it to PNG or JPEG") from error
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(f"has too many pixels: {error}") from error
    except Exception as error:  # decoders meet broken bytes with almost any exception: each one names a bad image
        raise ImageError(f"image cannot be decoded ({type(error).__name__}: {error})") from error


def open_image(stored: Mapping[str, object]) -> PIL.Image.Image:
    """Return a stored image as `datasets` decodes it: upright, in the mode of its file."""
    content = stored["bytes"]
    if not isinstance(content, bytes):
        import datasets  # takes a second to import, and only a dataset stores paths, which may be of the hub

        decoded: PIL.Image.Image = datasets.Image().decode_example(dict(stored))
        return decoded
    image = PIL.Image.open(io.BytesIO(content))
    image.load()
    return PIL.ImageOps.exif_transpose(image) if PIL.Image.ExifTags.Base.Orientation in image.getexif() else image


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if 0 in image.size:
        raise ImageError(f"image has no pixels ({image.width}x{image.height})")
    if image.mode == "F":
        raise ImageError("pixels are floating point numbers without a known range; convert the image to 8 bits")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > _MAX_16_BIT:
        raise ImageError("greyscale does not fit in 16 bits; convert the image to 8 bits")
    return PIL.Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")


def check_images(
    images: Images,
    rows: npt.NDArray[np.int64],
    *,
    num_workers: int | None = None,
    progress: bool = True,
    thumbnails: npt.NDArray[np.uint8] | None = None,
    keys: npt.NDArray[np.bytes_] | None = None,
    cache: CheckCache | None = None,
) -> tuple[npt.NDArray[np.int32], dict[int, str]]:
    """Decode every image that is not in the cache, in threads, and return the sizes and what is wrong with them.

    Args:
        images: where the images are read from.
        rows: (N,) row numbers to decode.
        num_workers: number of threads; one per CPU core by default.
        progress: show a progress bar that disappears when it is full.
        thumbnails: (N, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), filled with small versions of the good images if given.
        keys: (N,) of 16 bytes, filled with the hashes of the files if given; empty where one cannot be read.
        cache: what earlier checks have found; takes in what this one finds, also where it is interrupted.

    Returns:
        (N, 2) width and height after EXIF rotation (0, 0 where the image is bad), and the fault of each bad row.
    """
    sizes = np.zeros((len(rows), 2), dtype=np.int32)
    faults: dict[int, str] = {}

    per_task = max(_ROWS_PER_TASK, len(rows) // _MAX_TASKS)

    def check(start: int) -> int:
        task = rows[start : start + per_task]
        for position, row in enumerate(task.tolist(), start):
            try:
                stored = images.read(row)
                key = None if keys is None and cache is None else _key_of(stored)
                seen = _look_at(stored, key, cache, with_thumbnail=thumbnails is not None)
            except ImageError as error:
                faults[row] = printable(str(error))
                continue
            sizes[position] = seen.size
            if keys is not None and key is not None:
                keys[position] = key
            if thumbnails is not None and seen.thumbnail is not None:
                thumbnails[position] = seen.thumbnail
        return len(task)

    executor = ThreadPoolExecutor(num_workers or os.cpu_count())
    try:
        with tqdm(total=len(rows), desc="Checking images", unit="image", leave=False, disable=not progress) as bar:
            for num_checked in executor.map(check, range(0, len(rows), per_task)):
                bar.update(num_checked)
    finally:
        executor.shutdown(cancel_futures=True)  # an interrupt does not wait for the images still queued
        if cache is not None:
            cache.flush()
    return sizes, faults


def _key_of(stored: Mapping[str, object]) -> bytes | None:
    try:
        return content_key(stored)
    except (OSError, ValueError):
        return None  # decoding finds it all the same, or names the fault


def _look_at(
    stored: Mapping[str, object], key: bytes | None, cache: CheckCache | None, *, with_thumbnail: bool
) -> GoodImage:
    """Return what is known of an image, which is decoded where nothing is."""
    if cache is None or key is None:
        return _decoded(stored, with_thumbnail)
    seen = cache.find(key)
    if seen is None:
        seen = _decoded(stored, with_thumbnail)
        cache.add(key, seen)
    return seen


def _decoded(stored: Mapping[str, object], with_thumbnail: bool) -> GoodImage:
    image = decode_image(stored)
    return GoodImage(image.size, make_thumbnail(image) if with_thumbnail else None)


def first_names(names: Iterable[str]) -> str:
    """Return up to five names, comma-separated, for a log line."""
    shown = sorted(names)
    return printable(", ".join(shown[:5])) + (", ..." if len(shown) > 5 else "")
