"""Collections of images to audit: a folder or a dataset, read row by row, identified by content."""

import csv
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import PIL.Image
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from sd_memguard.audit import AuditError

logger = logging.getLogger(__name__)

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MASK = "-masklabel.png"
"""End of the name of a mask for ``--masked_loss``."""
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, eq=False)
class Collection:
    """Images with their captions, in the order of their rows; a row number is the sample id of training.

    Attributes:
        place: The folder, or the dataset's name.
        files: Names, relative to the folder; of a dataset, the row number with ``.png``.
        captions: One for each; the first where a row has several, empty where it has none.
        read: Gives the bytes of a row's file.
        is_folder: Whether ``files`` are files below ``place``.
        skipped: What is wrong with each row that is passed over, as in a training with ``--on_bad_sample skip``; None
            where a bad row is an error.
    """

    place: str
    files: Sequence[str]
    captions: Sequence[str]
    read: Callable[[int], bytes]
    is_folder: bool
    skipped: dict[int, str] | None = None

    def __len__(self) -> int:
        """Return the number of rows, repeats included."""
        return len(self.files)

    @cached_property
    def hashes(self) -> list[str]:
        """The SHA-256 of each row's file, with a progress bar; two rows with the same are the same image.

        That of a row that is passed over is empty.

        Raises:
            AuditError: Where a file is missing, unreadable or not an image; names the first ones.
        """
        found: list[str] = []
        faults = {} if self.skipped is None else dict(self.skipped)
        for row in tqdm(
            range(len(self)), desc=f"reading {self.place or 'generated images'}", unit="image", leave=False
        ):
            if row in faults:
                found.append("")
                continue
            try:
                content = self.read(row)
                with Image.open(io.BytesIO(content)) as image:  # reads the header, which tells an image from others
                    if self.skipped is not None:
                        image.load()
                found.append(hashlib.sha256(content).hexdigest())
            except (OSError, ValueError, SyntaxError) as error:
                faults[row] = str(error)
                found.append("")
        if faults:
            told = "; ".join(f"{self.files[row]}: {fault}" for row, fault in list(faults.items())[:3])
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            text = f"{len(faults)} of {len(self)} images in {self.place} cannot be used: {told}{more}"
            if self.skipped is None:
                raise AuditError(f"{text}; repair or remove them, or ignore them by `--on_bad_sample skip`")
            logger.warning("%s; they are passed over", text)
        return found

    @cached_property
    def distinct(self) -> list[int]:
        """The first row of each distinct image, ascending."""
        first: dict[str, int] = {}
        for row, content in enumerate(self.hashes):
            first.setdefault(content, row)
        first.pop("", None)
        return list(first.values())

    @property
    def sha256(self) -> str:
        """One hash of all files and captions in order."""
        lines = (f"{content} {caption!r}\n" for content, caption in zip(self.hashes, self.captions, strict=True))
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()

    def image(self, row: int) -> PIL.Image.Image:
        """Return an image in RGB, turned upright by its EXIF tag, transparency put on white.

        Raises:
            AuditError: Where its pixels are damaged.
        """
        try:
            with Image.open(io.BytesIO(self.read(row))) as image:
                upright = ImageOps.exif_transpose(image)
                if upright.has_transparency_data:
                    upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
                return upright.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise AuditError(f"{self.files[row]} in {self.place} is damaged: {error}; repair or remove it") from error


class _Row(NamedTuple):
    """A file, its caption, and what is wrong with the row, if anything."""

    file: str
    caption: str
    fault: str = ""


def read_folder(
    folder: Path,
    flag: str,
    caption_column: str = "text",
    *,
    needs_captions: bool = True,
    on_bad_sample: Literal["error", "skip"] = "error",
) -> Collection:
    """Return the images of a folder in the order that training gives them.

    With ``metadata.jsonl``, ``.csv`` or ``.parquet`` at its top: its rows. Otherwise every image below the folder in
    the order of their paths, captions from the ``.txt`` file of the same name.

    Args:
        folder: Where the images are.
        flag: The flag that named it, for messages.
        caption_column: Column of the metadata that holds the caption, or a list of which the first counts.
        needs_captions: Refuse images without captions, otherwise they get an empty one.
        on_bad_sample: Refuse rows that cannot be used, or ignore them; rows keep their numbers.

    Raises:
        AuditError: No such folder, no images, no captions, or metadata that cannot be read.
    """
    if not folder.is_dir():
        raise AuditError(f"`{flag}` {folder} is not a folder; name the folder that holds the images")
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    if metadata:
        rows = list(_metadata_rows(metadata[0], flag, caption_column, needs_captions))
    else:
        rows = list(_text_rows(folder, needs_captions))
    if not rows:
        raise AuditError(f"`{flag}` {folder} holds no images (.png, .jpg, ...); name another folder")
    root = folder.resolve()
    for number, row in enumerate(rows):
        if not row.fault and not (root / row.file).resolve().is_relative_to(root):
            fault = f"`{flag}` {folder} lists {row.file}, which lies outside of it; move the image into the folder"
            rows[number] = row._replace(fault=fault)
    faults = {number: row.fault for number, row in enumerate(rows) if row.fault}
    if faults and on_bad_sample == "error":
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise AuditError(f"{next(iter(faults.values()))}{more}")
    files = [row.file for row in rows]
    return Collection(
        str(folder),
        files,
        [row.caption for row in rows],
        lambda row: (root / files[row]).read_bytes(),
        True,
        faults if on_bad_sample == "skip" else None,
    )


def _text_rows(folder: Path, needs_captions: bool) -> Iterator[_Row]:
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        if any(part.startswith(".") for part in file.parts) or _is_mask(folder / file):
            continue
        text = (folder / file).with_suffix(".txt")
        lines = text.read_text(encoding="utf-8-sig", errors="replace").splitlines() if text.is_file() else []
        captions = [line.strip() for line in lines if line.strip()]
        fault = (
            f"{file.as_posix()} in {folder} has no caption; add metadata.jsonl, .csv or .parquet with `file_name` and "
            "the caption, or a .txt file beside each image"
        )
        yield _Row(file.as_posix(), captions[0] if captions else "", fault if needs_captions and not captions else "")


def _is_mask(file: Path) -> bool:
    """Whether a file is the mask of an image beside it, which training does not take for an image either."""
    stem = file.name.removesuffix(MASK)
    return stem != file.name and any(file.with_name(f"{stem}{suffix}").is_file() for suffix in SUFFIXES)


def _metadata_rows(file: Path, flag: str, caption_column: str, needs_captions: bool) -> Iterator[_Row]:
    try:
        rows = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[file.suffix](file)
    except (OSError, ValueError) as error:
        raise AuditError(f"`{flag}`: {file} cannot be read: {error}; repair it") from error
    for number, row in enumerate(rows, start=1):
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            fault = f"row {number} of {file} must name an image as `file_name`, it has {sorted(row)}; add it"
            yield _Row(f"row {number}", "", fault)
            continue
        caption = row.get(caption_column)
        caption = caption[0] if isinstance(caption, list) and caption else caption
        text = caption if isinstance(caption, str) else ""
        fault = (
            f"row {number} of {file} must have a caption as `{caption_column}`, it has {sorted(row)}; add it, or "
            "name the column with `--caption_column`"
        )
        yield _Row(name, text, fault if needs_captions and not text.strip() else "")


def _read_jsonl(file: Path) -> list[dict[str, object]]:
    """Return a row per line that is not blank, an empty one for a line that is no JSON object."""
    rows: list[dict[str, object]] = []
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError:
                value = {}
            rows.append(value if isinstance(value, dict) else {})
    return rows


def _read_csv(file: Path) -> list[dict[str, object]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return [dict(row) for row in csv.DictReader(lines)]


def _read_parquet(file: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(file).to_pylist()
    return rows


def read_dataset(name: str, image_column: str, caption_column: str) -> Collection:
    """Return the `train` split of a dataset on the hub or in a local folder, as training numbers its rows.

    Raises:
        AuditError: It cannot be loaded, or lacks the split or a column.
    """
    try:
        if any(Path(name, file).is_file() for file in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name)
    except Exception as error:  # whatever keeps it from loading, from the network to one broken file, is told alike
        raise AuditError(
            f"`--dataset_name` {name} cannot be loaded: {error}; check its name and the connection"
        ) from error
    rows = loaded["train"] if isinstance(loaded, datasets.DatasetDict) and "train" in loaded else loaded
    columns = rows.column_names
    if not isinstance(rows, datasets.Dataset) or not {image_column, caption_column} <= set(columns):
        raise AuditError(
            f"`--dataset_name` {name} must have a split `train` with the columns `{image_column}` and "
            f"`{caption_column}`, found {columns}; name them with `--image_column` and `--caption_column`"
        )
    stored = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    captions = [value[0] if isinstance(value, list) else value for value in rows[caption_column]]

    def read(row: int) -> bytes:
        image = stored[row][image_column]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    return Collection(name, [f"{row:08}.png" for row in range(len(rows))], captions, read, False)


def without(collection: Collection, excluded: Set[str]) -> Collection:
    """Return the collection without the images whose hashes are given."""
    kept = [row for row, content in enumerate(collection.hashes) if content not in excluded]
    return Collection(
        collection.place,
        [collection.files[row] for row in kept],
        [collection.captions[row] for row in kept],
        lambda row: collection.read(kept[row]),
        collection.is_folder,
    )
