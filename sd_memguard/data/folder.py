"""Captioned images from a folder, with metadata or with caption files.

The folder is read here rather than by `imagefolder`, which drops images that the metadata do not list, ignores `.txt`
captions and fails as a whole on one bad caption.
"""

import logging
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import NamedTuple

import pyarrow as pa

from sd_memguard.data.image_check import (
    ImageError,
    SampleError,
    caption_fault,
    first_names,
    is_unicode,
    printable,
    shortened,
)
from sd_memguard.data.masks import mask_name, without_masks
from sd_memguard.data.metadata import READERS, Record
from sd_memguard.data.rows import Row, Source, collect_rows, unknown_column

logger = logging.getLogger(__name__)

_IMAGE = re.compile(
    r".*\.(a?png|avif|bmp|dib|gif|hei[cf]|j2k|jfif|jp2|jpe|jpe?g|jxl|p[bgnp]m|tga|tiff?|webp)$", re.IGNORECASE
)
_METADATA_RULE = "`metadata.jsonl` (one JSON object per line), `metadata.csv` or `metadata.parquet`"
_LIKE_METADATA = re.compile(r"metadata|.*\.(json\w*|ndjson|csv|tsv|parquet)$", re.IGNORECASE)


class _Listing(NamedTuple):
    """The files below a folder, relative to it and written with slashes."""

    images: list[str]  # sorted
    texts: dict[str, str]  # file without its extension -> caption file
    metadata: list[str]  # sorted
    others: list[str]


class DataFolder:
    """A folder of which nothing outside is opened, neither by `..` nor through a link."""

    def __init__(self, folder: Path) -> None:
        """Remember where the folder really lies."""
        self.root = folder.resolve()
        # In a snapshot of the hub's cache every file is a link to `blobs`, beside `snapshots`.
        snapshots = [parent for parent in self.root.parents if parent.name == "snapshots"]
        self._allowed = [self.root, *(parent.parent / "blobs" for parent in snapshots)]

    def fault(self, file: str) -> str:
        """Return why a file of the folder must not be opened, nothing where it may: a pipe would block, for one."""
        path = self.root / file
        try:
            if not path.is_file():
                return "is not a file" if path.exists() else "is listed, but there is no such file"
            if not any(path.resolve().is_relative_to(allowed) for allowed in self._allowed):
                return "is a link that leaves the data folder; copy the file into it"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return ""


class FolderImages:
    """Images below a folder."""

    def __init__(self, folder: Path, files: pa.Array) -> None:
        """Take the folder, and the file of each row."""
        self._folder, self._files = DataFolder(folder), files

    def read(self, row: int) -> Mapping[str, object]:
        """Return the bytes of an image."""
        file = self._files[row].as_py()
        fault = self._folder.fault(file)
        if fault:
            raise ImageError(fault)
        return self._bytes_of(file)

    def read_mask(self, row: int) -> Mapping[str, object] | None:
        """Return the bytes of the mask beside an image, None where there is none."""
        file = mask_name(self._files[row].as_py())
        if not (self._folder.root / file).exists():
            return None
        if fault := self._folder.fault(file):
            raise ImageError(f"its mask {file} {fault}")
        return self._bytes_of(file)

    def _bytes_of(self, file: str) -> Mapping[str, object]:
        try:
            return {"path": file, "bytes": (self._folder.root / file).read_bytes()}
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from error


def read_folder(
    folder: str,
    *,
    image_column: str,
    caption_column: str,
    needs_captions: bool = True,
    setting: str = "--train_data_dir",
) -> Source:
    """Return the rows of a folder: those of its metadata files, else its images with their `.txt` captions.

    Metadata files may lie in sub-folders; image files are relative to them. Several are read in the order of their
    paths. Without metadata the rows are the images in the order of their paths; each line of a `.txt` file that is
    not blank is one caption of the image with the same name. Without ``needs_captions`` a folder of bare images is read
    as well, and each lacks its caption. Errors name the ``setting`` that gave the folder.

    Raises:
        SampleError: no such folder, no images, no captions at all, an unknown column or an unreadable metadata file.
    """
    root = Path(folder)
    if not root.is_dir():
        fault = "is a file, not a folder" if root.exists() else "does not exist"
        raise SampleError(f"`{setting}` {folder} {fault}; give the folder that holds the images")
    try:
        listing, inside = _list_files(root), DataFolder(root)
    except OSError as error:
        raise SampleError(f"`{setting}`: {error.filename} cannot be read: {error.strerror}") from error
    if listing.metadata:
        for file in listing.metadata:
            if fault := inside.fault(file):
                raise SampleError(f"`{setting}` {folder}: {file} {fault}")
        rows = _metadata_rows(root, listing, image_column, caption_column)
    elif not listing.images:
        raise SampleError(f"`{setting}` {folder} holds no images (.png, .jpg, ...){_hint(listing, root)}")
    elif needs_captions and listing.texts.keys().isdisjoint(_stem(file) for file in listing.images):
        raise SampleError(
            f"`{setting}` {folder} holds {len(listing.images)} images, but no captions: add {_METADATA_RULE}"
            f" or a `.txt` file of the same name beside each image{_hint(listing, root)}"
        )
    else:
        rows = _text_rows(inside, listing)
    collected = collect_rows(rows)
    if len(collected.files) == 0:
        raise SampleError(f"`{setting}` {folder}: {', '.join(listing.metadata)} holds no rows")
    if listing.metadata:
        _warn_of_unlisted(listing, set(collected.files.to_pylist()))
    return Source(folder, collected, FolderImages(root, collected.files))


def _list_files(root: Path) -> _Listing:
    listing = _Listing([], {}, [], [])
    linked = []
    for parent, folders, names in os.walk(root, onerror=_raise):
        prefix = PurePath(os.path.relpath(parent, root)).as_posix().removeprefix(".")
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked += [posixpath.join(prefix, name) for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in sorted(names):
            if name.startswith("."):
                continue  # `datasets` leaves hidden files out, too: macOS puts a `._photo.jpg` beside each image
            file = posixpath.join(prefix, name)
            if _IMAGE.match(name):
                listing.images.append(file)
            elif name in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
                listing.metadata.append(file)
            elif name.lower().endswith(".txt"):
                listing.texts[_stem(file)] = file
            else:
                listing.others.append(file)
    if linked:
        logger.warning("Linked folders are not searched for images: %s", first_names(linked))
    images, masks = without_masks(sorted(listing.images))
    listing.images[:] = images
    if masks:
        logger.info("%d masks are beside the images in %s: %s", len(masks), root, first_names(masks))
    listing.metadata.sort()
    return listing


def _raise(error: OSError) -> None:
    raise error


def count_images(folder: Path) -> int:
    """Return the number of image files below a folder."""
    return len(_list_files(folder).images)


def _stem(file: str) -> str:
    return posixpath.splitext(file)[0]


def _hint(listing: _Listing, root: Path) -> str:
    """Return the likely cause of finding nothing, ready to be appended to a message."""
    files = sorted([*listing.others, *listing.texts.values()])
    misnamed = [file for file in files if _LIKE_METADATA.match(posixpath.basename(file))]
    if misnamed:
        return f"; found `{printable(misnamed[0])}`: captions are read from {_METADATA_RULE}; rename or rewrite it" + (
            f", or load the folder with `--dataset_name {root}` if it holds the images as well"
            if misnamed[0].endswith(".parquet")
            else ""
        )
    if any(file.endswith(".arrow") for file in files):
        return f"; it holds Arrow files: load it with `--dataset_name {root}`"
    archives = [file for file in files if file.endswith((".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar"))]
    return f"; unpack {printable(archives[0])}" if archives else ""


def _text_rows(inside: DataFolder, listing: _Listing) -> Iterator[Row]:
    """Yield the images of a folder without metadata, each with the lines of the caption file beside it."""
    unused = listing.texts.keys() - {_stem(file) for file in listing.images}
    if unused:
        names = first_names(listing.texts[stem] for stem in unused)
        logger.warning("%d .txt files have no image of the same name and are not used: %s", len(unused), names)
    misnamed = [file for file in listing.others if _LIKE_METADATA.match(posixpath.basename(file))]
    if misnamed:
        logger.warning("Not read: %s; metadata are read from %s", first_names(misnamed), _METADATA_RULE)
    logger.info("Captions come from the .txt files beside the images in %s", inside.root)
    for file in listing.images:
        if not is_unicode(file):
            yield Row(printable(file), [], row_fault="file name is not valid UTF-8; rename it")
        elif (text := listing.texts.get(_stem(file))) is None:
            yield Row(file, None, caption_fault=f"has no caption: {_stem(file)}.txt is missing")
        else:
            yield _text_row(inside, file, text)


def _text_row(inside: DataFolder, file: str, text: str) -> Row:
    if fault := inside.fault(text):
        return Row(file, None, caption_fault=f"has no caption: {text} {fault}")
    try:
        content = (inside.root / text).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        return Row(file, None, caption_fault=f"has no caption: {text} cannot be read: {error.strerror}")
    captions = [line.strip() for line in content.splitlines() if line.strip()]
    fault = caption_fault(captions) if captions else "caption is empty"
    return Row(file, captions, caption_fault=f"{fault} ({text})" if fault else "")


def _metadata_rows(root: Path, listing: _Listing, image_column: str, caption_column: str) -> Iterator[Row]:
    """Yield the rows of every metadata file, and refuse columns that no row has."""
    kinds = {posixpath.splitext(file)[1] for file in listing.metadata}
    if len(kinds) > 1:
        raise SampleError(f"{root}: metadata files of one kind are read, found {', '.join(listing.metadata)}; keep one")
    logger.info("Captions come from column %s of %s in %s", caption_column, first_names(listing.metadata), root)
    if listing.texts:
        logger.info("The %d .txt files in %s are not used: metadata win", len(listing.texts), root)
    # `imagefolder` makes a column `image` of `file_name` and a column `photo` of `photo_file_name`.
    keys = [*(["file_name"] if image_column == "image" else []), f"{image_column}_file_name"]
    known = set(listing.images)
    columns: dict[str, None] = {}
    for file in listing.metadata:
        read = READERS[posixpath.splitext(file)[1]]
        for record in read(root / file, {*keys, caption_column}):
            columns.update(dict.fromkeys(record.columns))
            yield _metadata_row(file, record, keys, caption_column, known)
    if columns and not columns.keys() & set(keys):
        images = [_image_column(name) for name in columns if name == "file_name" or name.endswith("_file_name")]
        if not images:
            found = ", ".join(columns)
            raise SampleError(f"{', '.join(listing.metadata)} needs a column `file_name`, found: {found}; add it")
        raise unknown_column("--image_column", image_column, images)
    if columns and caption_column not in columns:
        raise unknown_column("--caption_column", caption_column, columns)


def _image_column(name: str) -> str:
    return name.removesuffix("file_name").removesuffix("_") or "image"


def _metadata_row(file: str, record: Record, keys: list[str], caption_column: str, known: set[str]) -> Row:
    where = f"{file} {record.where}"
    if record.fault:
        return Row(where, None, row_fault=record.fault)
    caption = record.values.get(caption_column)
    fault = caption_fault(caption)
    fault = f"{fault} (`{caption_column}`, {where})" if fault else ""
    name = next((record.values[key] for key in keys if record.values.get(key)), None)
    if not isinstance(name, str):
        return Row(where, caption, f"`{keys[0]}` must name an image, got {shortened(name)}", fault)
    path = _relative_path(posixpath.dirname(file), name)
    if path is None:
        rule = f"`{keys[0]}` must be a path inside the data folder, relative to the metadata file"
        return Row(where, caption, f"{rule}, got {shortened(name)}", fault)
    return Row(_as_stored(path, known), caption, "", fault)


def _relative_path(folder: str, name: str) -> str | None:
    """Return a file named by metadata relative to the data folder, or None if it is not a path inside it."""
    path = posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))
    is_safe = "://" not in name and "\0" not in name and is_unicode(name) and not PureWindowsPath(name).anchor
    return path if is_safe and path.split("/", 1)[0] not in ("..", ".") else None


def _as_stored(path: str, known: set[str]) -> str:
    """Return the spelling of a file name on disk: macOS decomposes accents that metadata write composed."""
    spellings = (path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")))
    return next((spelling for spelling in spellings if spelling in known), path)


def _warn_of_unlisted(listing: _Listing, listed: set[str]) -> None:
    unlisted = [file for file in listing.images if file not in listed]
    if unlisted:
        names = first_names(unlisted)
        logger.warning("%d images are not listed in the metadata and are not used: %s", len(unlisted), names)
