"""Metadata files read row by row, so that a broken row is named instead of failing the file."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sd_memguard.data.image_check import SampleError

_UNDECODABLE = "\udcff"  # stands for an Arrow text that is not UTF-8; reported as such


class Record(NamedTuple):
    """One row of a metadata file."""

    where: str  # "line 12"
    columns: Iterable[str]
    values: Mapping[str, object]
    fault: str = ""


def _read_jsonl(path: Path, wanted: set[str]) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Record(where, (), {}, f"is not valid JSON: {error}")
                continue
            if isinstance(values, dict):
                yield Record(where, values, values)
            else:
                yield Record(where, (), {}, f"must be a JSON object on one line, got {type(values).__name__}")


def _read_csv(path: Path, wanted: set[str]) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            for fields in reader:
                where = f"line {reader.line_num}"
                if len(fields) > len(header):
                    fault = f"has {len(fields)} fields under {len(header)} columns; put captions with commas in quotes"
                    yield Record(where, header, {}, fault)
                elif fields:
                    yield Record(where, header, dict(zip(header, fields, strict=False)))
        except csv.Error as error:
            raise SampleError(f"{path} line {reader.line_num} is not valid CSV: {error}") from error


def _read_parquet(path: Path, wanted: set[str]) -> Iterator[Record]:
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            present = [name for name in columns if name in wanted]
            number = 0
            for batch in file.iter_batches(columns=present):
                for row in range(batch.num_rows):
                    values = {name: as_python(batch.column(name)[row]) for name in present}
                    yield Record(f"row {number}", columns, values)
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SampleError(f"{path} cannot be read as Parquet: {error}") from error


READERS: dict[str, Callable[[Path, set[str]], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def as_python(value: pa.Scalar) -> object:
    """Return an Arrow value in Python; a text that is not UTF-8 comes back as one that `is_unicode` refuses."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return _UNDECODABLE
