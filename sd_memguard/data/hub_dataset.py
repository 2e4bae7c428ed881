"""Captioned images from a dataset of `datasets`, on the hub or in a local folder."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from sd_memguard.data.image_check import ImageError, SampleError, caption_fault
from sd_memguard.data.metadata import as_python
from sd_memguard.data.rows import ROWS_PER_BATCH, Row, Source, collect_rows, unknown_column

logger = logging.getLogger(__name__)


class DatasetImages:
    """The image column of a dataset, memory-mapped and not decoded."""

    def __init__(self, dataset: datasets.Dataset, image_column: str) -> None:
        """Keep that column alone."""
        self._column = image_column
        self._rows = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))

    def read(self, row: int) -> Mapping[str, object]:
        """Return the bytes of an image, or its path where the dataset stores no more."""
        stored: Mapping[str, object] | None = self._rows[row][self._column]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise ImageError(f"has no image in `{self._column}`")
        return stored

    def read_mask(self, row: int) -> None:
        """Return nothing: masks of a dataset are the alpha channels of its images."""

    def paths(self) -> Iterator[object]:
        """Yield the stored path of each image, or None."""
        for batch in self._rows.with_format("arrow").iter(ROWS_PER_BATCH):
            yield from map(as_python, pc.struct_field(batch[self._column], "path"))


def read_dataset(
    dataset_name: str,
    dataset_config_name: str | None,
    *,
    data_dir: str | None,
    cache_dir: str | None,
    image_column: str,
    caption_column: str,
) -> Source:
    """Return the rows of the `train` split of a dataset on the hub or in a local folder.

    Raises:
        SampleError: it cannot be loaded, is streamed, has no split `train` or not these columns.
    """
    dataset = _train_split(dataset_name, dataset_config_name, data_dir, cache_dir)
    for setting, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column not in dataset.column_names:
            raise unknown_column(setting, column, dataset.column_names)
    kinds = dataset.features.arrow_schema
    if not (isinstance(dataset.features[image_column], datasets.Image) or _holds_bytes(kinds.field(image_column).type)):
        raise SampleError(_wrong_kind("--image_column", image_column, "images", dataset))
    if not _holds_text(kinds.field(caption_column).type):
        raise SampleError(_wrong_kind("--caption_column", caption_column, "texts", dataset))
    if len(dataset) == 0:
        raise SampleError(f"`--dataset_name` {dataset_name}: the split `train` has no rows")
    images = DatasetImages(dataset, image_column)
    captions = dataset.select_columns([caption_column]).with_format("arrow").iter(ROWS_PER_BATCH)
    values = (as_python(value) for batch in captions for value in batch[caption_column])
    rows = (
        Row(path if isinstance(path, str) else f"row {row}", value, caption_fault=caption_fault(value))
        for row, (path, value) in enumerate(zip(images.paths(), values, strict=True))
    )
    logger.info("Captions come from column %s of %s", caption_column, dataset_name)
    return Source(dataset_name, collect_rows(rows), images)


def _train_split(
    dataset_name: str, dataset_config_name: str | None, data_dir: str | None, cache_dir: str | None
) -> datasets.Dataset:
    saved_to_disk = any(Path(dataset_name, name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved_to_disk:
            loaded = datasets.load_from_disk(dataset_name)
        else:
            loaded = datasets.load_dataset(dataset_name, dataset_config_name, data_dir=data_dir, cache_dir=cache_dir)
    except Exception as error:  # whatever keeps it from loading, from the network to one broken file, is told alike
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise SampleError(
            f"`--dataset_name` {dataset_name} cannot be loaded: {error}{cause}; check its name, its files and the"
            " connection, or give a folder of images as `--train_data_dir`"
        ) from error
    if isinstance(loaded, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise SampleError(
            f"`--dataset_name` {dataset_name} is a streaming dataset ({type(loaded).__name__}), but samples are told"
            " apart by their row number; load it without streaming"
        )
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            splits = ", ".join(loaded)
            raise SampleError(
                f"`--dataset_name` {dataset_name} needs a split `train`, found: {splits}; name a split, or the folder"
                " of its files, so"
            )
        return loaded["train"]
    return loaded


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in {member.name for member in kind}
    return kind in (pa.binary(), pa.large_binary())


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.null())


def _wrong_kind(setting: str, column: str, wanted: str, dataset: datasets.Dataset) -> str:
    kinds = ", ".join(
        f"{name}: {getattr(kind, 'dtype', type(kind).__name__)}" for name, kind in dataset.features.items()
    )
    return f"`{setting}` must name a column of {wanted}, got {column}; the columns are {kinds}"
