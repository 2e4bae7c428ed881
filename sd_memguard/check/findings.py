"""What a check finds in a folder: unusable samples, odd images, captions, and groups of duplicates."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sd_memguard.check.parts import SharedImages, check_number, find_parts
from sd_memguard.core.duplicates import THUMBNAIL_SIDE, find_groups, keep_rows
from sd_memguard.data.folder import read_folder
from sd_memguard.data.image_check import ImageError, check_images, content_key
from sd_memguard.data.rows import Source

FLAT = 3.0
"""An image whose grey levels deviate by less from their mean shows nothing."""

LONG_CAPTION = 60
"""Words; CLIP's text encoder reads 77 tokens, and cuts off what comes after."""


_ROWS_PER_CHUNK = 4096


class Group(NamedTuple):
    """Samples of one image.

    Attributes:
        rows: Ascending.
        kept: The largest, the first of several.
        is_exact: Whether all files are equal to the byte.
    """

    rows: list[int]
    kept: int
    is_exact: bool


class Findings(NamedTuple):
    """What was found, by row of the folder.

    Attributes:
        source: The folder's rows and images.
        sizes: (N, 2) int32, width and height; 0 where the image cannot be read.
        has_captions: Whether any sample has a caption; where none has, their lack is no fault of each.
        unusable: Why a sample cannot be trained on: its image or its caption.
        odd: What is unusual about a usable image or caption.
        groups: Duplicates, the largest group first.
        parts: Images that share a part, where that was asked for.
    """

    source: Source
    sizes: npt.NDArray[np.int32]
    has_captions: bool
    unusable: dict[int, str]
    odd: dict[int, str]
    groups: list[Group]
    parts: list[SharedImages]

    @property
    def kept(self) -> list[int]:
        """The rows that are usable, one of each group."""
        dropped = {row for group in self.groups for row in group.rows if row != group.kept}
        return [row for row in range(len(self.sizes)) if row not in self.unusable and row not in dropped]

    def file(self, row: int) -> str:
        """Return the file of a row, relative to the folder."""
        return str(self.source.rows.files[row].as_py())

    def captions(self, row: int) -> list[str]:
        """Return the captions of a row, none where they are faulty."""
        captions: list[str] = self.source.rows.captions[row].as_py()
        return captions


def find(
    folder: Path,
    *,
    image_column: str,
    caption_column: str,
    flip: bool,
    resolution: int | None,
    max_aspect_ratio: float,
    local_features: bool = False,
    progress: bool = True,
) -> Findings:
    """Return what there is to find in a folder; every image is decoded once, for local features twice.

    Args:
        folder: Of images, with metadata or caption files.
        image_column: Of the metadata.
        caption_column: Of the metadata.
        flip: Whether flipped images are duplicates.
        resolution: Name images with a shorter edge; None: any size will do.
        max_aspect_ratio: Name longer ones.
        local_features: Look for images that share a part.
        progress: Show a progress bar.

    Raises:
        SampleError: The folder cannot be read at all.
        UserError: Local features of too many images, or without OpenCV.
    """
    source = read_folder(str(folder), image_column=image_column, caption_column=caption_column, needs_captions=False)
    count = len(source.rows.files)
    if local_features:
        check_number(count)
    readable = np.setdiff1d(np.arange(count), list(source.rows.row_faults)).astype(np.int64)
    thumbnails = np.zeros((len(readable), THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), dtype=np.uint8)
    checked, image_faults = check_images(source.images, readable, progress=progress, thumbnails=thumbnails)
    sizes = np.zeros((count, 2), dtype=np.int32)
    sizes[readable] = checked
    has_captions = len(source.rows.caption_faults) < count
    kinds = (source.rows.row_faults, image_faults, source.rows.caption_faults if has_captions else {})
    unusable = {
        row: "; ".join(faults[row] for faults in kinds if row in faults)
        for row in sorted({row for k in kinds for row in k})
    }
    good = np.flatnonzero(sizes[readable].all(axis=1))
    thumbnails = keep_rows(thumbnails, good)
    first = find_groups(thumbnails, flip=flip)
    flat = _flat(thumbnails)
    rows = readable[good]
    odd = _odd_images(rows, sizes, flat, resolution, max_aspect_ratio)
    for row, words in _odd_captions(source, set(rows.tolist()) - unusable.keys()).items():
        odd[row] = f"{odd[row]}; {words}" if row in odd else words
    groups = _groups(source, rows, first, sizes, unusable)
    dropped = {row for group in groups for row in group.rows if row != group.kept}
    single = [row for row in rows.tolist() if row not in dropped]
    parts = find_parts(source, single, flip=flip, progress=progress) if local_features else []
    return Findings(source, sizes, has_captions, unusable, dict(sorted(odd.items())), groups, parts)


def _flat(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return which images show nothing, (N,)."""
    flat = np.empty(len(thumbnails), dtype=bool)
    for start in range(0, len(thumbnails), _ROWS_PER_CHUNK):  # in floating point all of them would not fit
        part = slice(start, start + _ROWS_PER_CHUNK)
        flat[part] = thumbnails[part].mean(axis=3).std(axis=(1, 2)) < FLAT
    return flat


def _odd_images(
    rows: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int32],
    flat: npt.NDArray[np.bool_],
    resolution: int | None,
    max_aspect_ratio: float,
) -> dict[int, str]:
    odd = {}
    short, long = sizes[rows].min(axis=1), sizes[rows].max(axis=1)
    for row, low, high, is_flat in zip(rows.tolist(), short.tolist(), long.tolist(), flat.tolist(), strict=True):
        width, height = sizes[row]
        words = [
            *([f"is smaller than {resolution} px ({width}x{height})"] if resolution and low < resolution else []),
            *([f"is long ({width}x{height})"] if high > max_aspect_ratio * low else []),
            *(["is of one colour"] if is_flat else []),
        ]
        if words:
            odd[row] = "; ".join(words)
    return odd


def _odd_captions(source: Source, rows: set[int]) -> dict[int, str]:
    odd = {}
    for row in sorted(rows):
        longest = max((len(caption.split()) for caption in source.rows.captions[row].as_py()), default=0)
        if longest > LONG_CAPTION:
            odd[row] = f"caption has {longest} words: what a text encoder of 77 tokens does not read is lost"
    return odd


def _groups(
    source: Source,
    rows: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int32],
    unusable: dict[int, str],
) -> list[Group]:
    """Return the groups of two and more; the one that is kept is usable, where any is."""
    members: dict[int, list[int]] = {}
    for position in np.flatnonzero(np.bincount(first, minlength=len(first))[first] > 1).tolist():
        members.setdefault(int(first[position]), []).append(int(rows[position]))
    found = []
    for group in members.values():
        usable = [row for row in group if row not in unusable] or group
        kept = max(usable, key=lambda row: (int(sizes[row].astype(np.int64).prod()), -row))
        found.append(Group(group, kept, len({_content(source, row) for row in group}) == 1))
    return sorted(found, key=lambda group: (-len(group.rows), group.rows[0]))


def _content(source: Source, row: int) -> bytes | int:
    try:
        return content_key(source.images.read(row))
    except (ImageError, OSError):  # removed since it was decoded: equal to nothing
        return row


def repeated_captions(findings: Findings) -> list[tuple[str, int]]:
    """Return the captions that different images share, with the number of images, the most frequent first."""
    counts = Counter(caption for row in findings.kept for caption in findings.captions(row))
    return [(caption, count) for caption, count in counts.most_common() if count > 1]
