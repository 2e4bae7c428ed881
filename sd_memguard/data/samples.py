"""The captioned images of a run, read and checked before any model is loaded."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image
import pyarrow as pa

from sd_memguard.core.duplicates import THUMBNAIL_SIDE, find_groups, keep_rows
from sd_memguard.data.folder import read_folder
from sd_memguard.data.image_check import (
    BadSample,
    ImageError,
    Images,
    SampleError,
    bad_samples_message,
    check_images,
    content_key,
    decode_image,
)
from sd_memguard.data.image_check_cache import CheckCache
from sd_memguard.data.masks import check_masks, read_mask
from sd_memguard.data.rows import Source

__all__ = ["BadSample", "Checked", "SampleError", "Samples", "load_samples"]

logger = logging.getLogger(__name__)

_KEYS_PER_TASK = 1024


class Checked(NamedTuple):
    """What the check of the images has found; see ``Samples`` for the fields."""

    sizes: npt.NDArray[np.int32]
    bad: list[BadSample]
    groups: npt.NDArray[np.int64] | None
    keys: npt.NDArray[np.bytes_] | None = None
    masked: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False)
class Samples:
    """Captioned images; a sample id is the row number before any row is dropped.

    Attributes:
        name: the folder or the dataset's name, for messages.
        num_rows: rows of the source, bad ones and those beyond `max_train_samples` included.
        sample_ids: (num_good,) int64, ascending: the rows to train on.
        sizes: (num_rows, 2) int32, width and height after EXIF rotation; 0, 0 for rows that are not used.
        bad: what is wrong with the rows that were dropped, by ascending sample id.
        groups: (num_rows,) int64, for each row the first sample of its group of duplicates, itself where it is single
            or not used; None where duplicates were not looked for.
        keys: (num_rows,) of 16 bytes, the hash of each file as it was checked, empty where it is not known; or None.
        masked: (num_rows,) whether only a part of each image counts; None where masks were not looked for.
    """

    name: str
    num_rows: int
    sample_ids: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]
    bad: list[BadSample]
    _files: pa.Array = field(repr=False)
    _captions: pa.Array = field(repr=False)
    _images: Images = field(repr=False)
    groups: npt.NDArray[np.int64] | None = field(default=None, repr=False)
    keys: npt.NDArray[np.bytes_] | None = field(default=None, repr=False)
    masked: npt.NDArray[np.bool_] | None = field(default=None, repr=False)

    def image(self, sample_id: int) -> PIL.Image.Image:
        """Return the image in RGB, turned upright by its EXIF tag.

        Raises:
            SampleError: it has been changed or removed since it was checked.
        """
        return self.keyed_image(sample_id)[1]

    def keyed_image(self, sample_id: int) -> tuple[bytes, PIL.Image.Image]:
        """Return the hash of the image's file (16 bytes) and the image, from one and the same read.

        Raises:
            SampleError: it has been changed or removed since it was checked.
        """
        try:
            stored = self._images.read(sample_id)
            return content_key(stored), decode_image(stored)
        except (ImageError, OSError) as error:
            raise self._changed(sample_id, error) from error

    def mask(self, sample_id: int) -> PIL.Image.Image | None:
        """Return the mask of an image in 8 bits of grey, None where all of it counts.

        Raises:
            SampleError: it has been changed or removed since it was checked.
        """
        if self.masked is None or not self.masked[sample_id]:
            return None
        try:
            return read_mask(self._images, sample_id)
        except (ImageError, OSError) as error:
            raise self._changed(sample_id, error) from error

    def content_keys(self) -> npt.NDArray[np.bytes_]:
        """Return the hash of each usable sample's file, (num_good,) of 16 bytes: as the check has read it.

        Raises:
            SampleError: a file has been removed since it was checked.
        """
        keys = np.zeros(len(self.sample_ids), "S16") if self.keys is None else self.keys[self.sample_ids]
        unknown = np.flatnonzero(keys == b"")

        def read(start: int) -> None:
            for position in unknown[start : start + _KEYS_PER_TASK].tolist():
                sample_id = int(self.sample_ids[position])
                try:
                    keys[position] = content_key(self._images.read(sample_id))
                except (ImageError, OSError) as error:
                    raise self._changed(sample_id, error) from error

        with ThreadPoolExecutor() as executor:
            list(executor.map(read, range(0, len(unknown), _KEYS_PER_TASK)))
        return keys

    def _changed(self, sample_id: int, error: Exception) -> SampleError:
        bad = BadSample(sample_id, self.file(sample_id), str(error))
        return SampleError(f"{self.name}: sample {sample_id}, {bad.file}, was changed after the check: {error}", [bad])

    def files(self) -> pa.Array:
        """Return the file of each usable sample, see ``file``."""
        return self._files.take(pa.array(self.sample_ids))

    def caption_lists(self) -> pa.LargeListArray:
        """Return the captions of the usable samples, (num_good,) lists of one or more."""
        return self._captions.take(pa.array(self.sample_ids))

    def captions(self, sample_id: int) -> list[str]:
        """Return the captions of a usable sample, at least one."""
        captions: list[str] = self._captions[sample_id].as_py()
        return captions

    def file(self, sample_id: int) -> str:
        """Return the file relative to the data folder, or what a dataset stores as its path, or "row 12"."""
        file: str = self._files[sample_id].as_py()
        return file


def load_samples(
    *,
    train_data_dir: str | None,
    dataset_name: str | None,
    dataset_config_name: str | None,
    cache_dir: str | None,
    image_column: str,
    caption_column: str,
    max_train_samples: int | None,
    seed: int,
    on_bad_sample: Literal["error", "skip"],
    find_duplicates: bool = False,
    duplicates_flip: bool = False,
    num_workers: int | None = None,
    progress: bool = True,
    checked: Checked | None = None,
    cache: CheckCache | None = None,
    setting: str = "--train_data_dir",
    caption: str | None = None,
    masked: bool = False,
) -> Samples:
    """Return the captioned images of a folder or dataset, with every row in use read and every image decoded.

    The settings are those of diffusers' `train_text_to_image.py`. With a dataset, `train_data_dir` is the part of it
    that is loaded.

    Args:
        train_data_dir: folder with images and metadata.jsonl, .csv, .parquet or caption .txt files.
        dataset_name: dataset on the hub or in a local folder; comes before `train_data_dir`.
        dataset_config_name: its configuration.
        cache_dir: where downloads are kept.
        image_column: column of the images; in a folder, `image` stands for the column `file_name`.
        caption_column: column of a caption or a list of captions.
        max_train_samples: use this many rows, chosen by `seed`: the rows that the upstream script chooses.
        seed: of that choice.
        on_bad_sample: refuse the data, or drop the bad samples and keep the ids of the others.
        find_duplicates: group the near-identical images.
        duplicates_flip: count flipped images as near-identical.
        num_workers: threads that decode; one per CPU core by default.
        progress: show a progress bar.
        checked: what a check of the same rows has found; no image is opened then.
        cache: what earlier checks have found about the same files, which are not decoded again.
        setting: the one that gave the folder, for errors.
        caption: of every image of the folder, whatever else is there; by default each has its own.
        masked: look for the masks of images, see ``masks``.

    Raises:
        SampleError: the data cannot be found or understood, or samples are bad; names all that is wrong with them.
    """
    if dataset_name:
        from sd_memguard.data.hub_dataset import read_dataset  # `datasets` takes a second to import

        source = read_dataset(
            dataset_name,
            dataset_config_name,
            data_dir=train_data_dir,
            cache_dir=cache_dir,
            image_column=image_column,
            caption_column=caption_column,
        )
    elif train_data_dir:
        source = read_folder(
            train_data_dir,
            image_column=image_column,
            caption_column=caption_column,
            needs_captions=caption is None,
            setting=setting,
        )
        if caption is not None:
            source = source._replace(rows=source.rows.under(caption))
    else:
        raise SampleError("there are no data to train on: give `--train_data_dir FOLDER` or `--dataset_name NAME`")
    num_rows = len(source.rows.files)
    chosen = _choose_rows(num_rows, max_train_samples, seed)
    sizes, bad, groups, keys, masks = checked or _check(
        source, chosen, num_workers, progress, find_duplicates, duplicates_flip, cache, masked=masked
    )
    if bad:
        _report_bad(source.name, bad, len(chosen), on_bad_sample)
    sample_ids = np.setdiff1d(chosen, [one.sample_id for one in bad], assume_unique=True).astype(np.int64)
    files, captions = source.rows.files, source.rows.captions
    images = source.images
    return Samples(source.name, num_rows, sample_ids, sizes, bad, files, captions, images, groups, keys, masks)


def _report_bad(name: str, bad: list[BadSample], num_samples: int, on_bad_sample: Literal["error", "skip"]) -> None:
    if len(bad) == num_samples:
        raise SampleError(bad_samples_message(name, bad, num_samples, "No sample is left; repair them."), bad)
    if on_bad_sample == "error":
        advice = "Repair or remove them, or train without them by `--on_bad_sample skip`."
        raise SampleError(bad_samples_message(name, bad, num_samples, advice), bad)
    advice = f"Training goes on with the other {num_samples - len(bad)}."
    logger.warning("%s", bad_samples_message(name, bad, num_samples, advice))


def _choose_rows(num_rows: int, max_train_samples: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Return the rows in use, ascending: those of `dataset.shuffle(seed).select(range(max_train_samples))`."""
    if max_train_samples is None:
        return np.arange(num_rows)
    if max_train_samples < 1:
        raise SampleError(f"`--max_train_samples` must be at least 1, got {max_train_samples}; raise it or omit it")
    if max_train_samples > num_rows:
        logger.warning(
            "`--max_train_samples` is %d, but there are %d samples: all are used", max_train_samples, num_rows
        )
    return np.sort(np.random.default_rng(seed).permutation(num_rows)[:max_train_samples])


def _check(
    source: Source,
    rows: npt.NDArray[np.int64],
    num_workers: int | None,
    progress: bool,
    find_duplicates: bool,
    duplicates_flip: bool,
    cache: CheckCache | None,
    *,
    masked: bool,
) -> Checked:
    """Return the sizes of all images, the bad samples among the rows with all that is wrong, groups and masks."""
    files, _, row_faults, caption_faults = source.rows
    readable = rows[~np.isin(rows, list(row_faults))]
    shape = (len(readable), THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)
    thumbnails = np.empty(shape, dtype=np.uint8) if find_duplicates else None
    read_keys = np.zeros(len(readable), "S16")
    checked, image_faults = check_images(
        source.images,
        readable,
        num_workers=num_workers,
        progress=progress,
        thumbnails=thumbnails,
        keys=read_keys,
        cache=cache,
    )
    keys = np.zeros(len(files), "S16")
    keys[readable] = read_keys
    sizes = np.zeros((len(files), 2), dtype=np.int32)
    sizes[readable] = checked
    has_mask: npt.NDArray[np.bool_] | None = None
    mask_faults: dict[int, str] = {}
    if masked:
        decoded = readable[checked.all(axis=1)]
        has_mask = np.zeros(len(files), bool)
        has_mask[decoded], mask_faults = check_masks(source.images, decoded, sizes[decoded])
    bad = []
    kinds = (row_faults, caption_faults, image_faults, mask_faults)
    for row in np.intersect1d(rows, [row for faults in kinds for row in faults]).astype(int).tolist():
        bad.append(BadSample(row, files[row].as_py(), "; ".join(faults[row] for faults in kinds if row in faults)))
        sizes[row] = 0
    if thumbnails is None:
        return Checked(sizes, bad, None, keys, has_mask)
    groups = np.arange(len(files))
    good = np.flatnonzero(sizes[readable].all(axis=1))
    groups[readable[good]] = readable[good[find_groups(keep_rows(thumbnails, good), flip=duplicates_flip)]]
    return Checked(sizes, bad, groups, keys, has_mask)
