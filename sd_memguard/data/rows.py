"""The rows of a dataset, kept in Arrow arrays so that a million of them fit."""

import difflib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import pyarrow as pa

from sd_memguard.data.image_check import Images, SampleError, printable

ROWS_PER_BATCH = 10_000


class Row(NamedTuple):
    """What is known of a row before its image is opened."""

    file: str  # the place in the metadata where they name none
    caption: object  # a text or a list of texts, unless there is a fault
    row_fault: str = ""
    caption_fault: str = ""


class Rows(NamedTuple):
    """Every row of a dataset, and what is wrong with some of them."""

    files: pa.Array  # (num_rows,) text
    captions: pa.Array  # (num_rows,) list of texts, empty where there is a fault
    row_faults: dict[int, str]  # rows that name no file
    caption_faults: dict[int, str]

    def under(self, caption: str) -> "Rows":
        """Return the same images, all under one caption."""
        captions = pa.array([[caption]] * len(self.files), self.captions.type)
        return self._replace(captions=captions, caption_faults={})


class Source(NamedTuple):
    """A dataset before any image is opened."""

    name: str
    rows: Rows
    images: Images


def collect_rows(rows: Iterator[Row]) -> Rows:
    """Return the rows in Arrow arrays; only a batch of them at a time is in Python objects."""
    files, captions = [pa.array([], pa.large_string())], [pa.array([], pa.large_list(pa.large_string()))]
    row_faults: dict[int, str] = {}
    caption_faults: dict[int, str] = {}
    start = 0
    while batch := list(islice(rows, ROWS_PER_BATCH)):
        files.append(pa.array([printable(row.file) for row in batch], pa.large_string()))
        usable = [[] if row.row_fault or row.caption_fault else row.caption for row in batch]
        texts = [[caption] if isinstance(caption, str) else caption for caption in usable]
        captions.append(pa.array(texts, pa.large_list(pa.large_string())))
        row_faults |= {i: printable(row.row_fault) for i, row in enumerate(batch, start) if row.row_fault}
        caption_faults |= {i: printable(row.caption_fault) for i, row in enumerate(batch, start) if row.caption_fault}
        start += len(batch)
    return Rows(pa.concat_arrays(files), pa.concat_arrays(captions), row_faults, caption_faults)


def unknown_column(setting: str, name: str, columns: Iterable[str]) -> SampleError:
    """Return the error for a column that the data do not have; it lists the columns and suggests the nearest."""
    columns = list(columns)
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    guess = f"; did you mean `{near[0]}`?" if near else "; choose one of them"
    return SampleError(
        printable(f"`{setting}` must be one of the data's columns ({', '.join(columns)}), got {name}{guess}")
    )
