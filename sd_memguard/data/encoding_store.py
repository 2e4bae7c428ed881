"""Rows on disk (latents, text embeddings, checked images), keyed by what they were made of, and shared by runs.

A folder holds rows of one kind that were made in one way (its *context*: network, preprocessing, precision, versions).
It consists of safetensors files with ``keys`` (n, 16) uint8, the hashes of the images or captions, and ``values``
(n, ...). A file is complete when it gets its name and never changes: runs may write and read at the same time. Its
header names the context and the hash of the content, so that a file that is damaged, or lies in the wrong folder, is
noticed and its rows are made again.
"""

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sd_memguard.files import TEMPORARY_PREFIX, flush

logger = logging.getLogger(__name__)

KEY = "S16"
"""Type of a hash in numpy."""
Keys = npt.NDArray[np.bytes_]
ABANDONED_AFTER = 24 * 3600
"""Seconds after which a file that is still being written is taken for that of a run that was killed."""
FILE_BYTES = 2**28
"""Bytes of values after which a file is written."""
MISSING = -1


class _File(NamedTuple):
    keys: Keys
    values: npt.NDArray[np.uint8]  # (n, bytes of a row), memory-mapped


class DamagedError(ValueError):
    """A file is not what was written, or belongs elsewhere."""


class EncodingStore:
    """Rows of one kind by the hash of what they were made of.

    Args:
        folder: of all stores; made where it is missing, for its owner alone.
        kind: what the rows are, the first part of the name of the sub-folder.
        context: all that decides what a row is besides its key, JSON values.
        shape: of a row.
        dtype: of a row.
    """

    def __init__(
        self, folder: Path, kind: str, context: Mapping[str, object], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.shape, self.dtype = shape, dtype
        described = {"kind": kind, "shape": list(shape), "dtype": str(dtype), **context}
        self.context = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.folder = folder / f"{kind}-{self.context}"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = json.dumps(described, indent=2) + "\n"
        self._place(self.folder / "context.json", lambda temporary: temporary.write_text(text))
        self._waiting_keys: list[bytes] = []
        self._waiting_rows: list[Tensor] = []
        self._files: list[_File] = []
        self._names: set[str] = set()
        self._remove_abandoned()
        self.refresh()

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Return the row of each key, (N,), -1 where there is none."""
        if len(self._sorted) == 0:
            return np.full(len(keys), MISSING)
        place = np.searchsorted(self._sorted, keys).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[place] == keys, self._order[place], MISSING)

    def read(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Return rows by their numbers, (B, *shape), on the CPU."""
        values = np.empty((len(rows), self.row_bytes), np.uint8)
        files = np.searchsorted(self._starts, rows, side="right") - 1
        for position, (file, row) in enumerate(zip(files.tolist(), rows.tolist(), strict=True)):
            values[position] = self._files[file].values[row - self._starts[file]]
        if not len(rows):  # numpy gives an array without rows no strides that `view` could work with
            return torch.empty(0, *self.shape, dtype=self.dtype)
        return torch.from_numpy(values).view(self.dtype).unflatten(-1, self.shape)

    def add(self, keys: Sequence[bytes], rows: Tensor) -> None:
        """Take rows (B, *shape) in; they can be found after the next ``flush``."""
        self._waiting_keys += [key.ljust(16, b"\0") for key in keys]  # numpy drops zeros at the end
        self._waiting_rows.append(rows.to("cpu", self.dtype))
        if len(self._waiting_keys) * self.row_bytes >= FILE_BYTES:
            self._write()

    def refresh(self) -> None:
        """Take in the files that are there, or that others have written since."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._names:
                continue
            try:
                self._files.append(self._open(path))
                self._names.add(path.name)
            except (DamagedError, OSError, SafetensorError, ValueError, KeyError) as error:
                logger.warning("%s is not used, and what it should hold is computed again: %s", path, error)
        self._index()

    def flush(self) -> None:
        """Write what was added."""
        if self._waiting_keys:
            self._write()
        self._index()

    def _write(self) -> None:
        keys = torch.frombuffer(bytearray().join(self._waiting_keys), dtype=torch.uint8).view(-1, 16)
        values = torch.cat(self._waiting_rows).contiguous()
        digest = _digest(keys.numpy(), values.view(torch.uint8).numpy())
        path, metadata = self.folder / f"{digest}.safetensors", {"context": self.context, "digest": digest}
        self._place(path, lambda temporary: save_file({"keys": keys, "values": values}, temporary, metadata))
        self._waiting_keys, self._waiting_rows = [], []
        self._files.append(self._open(path, verify=False))
        self._names.add(path.name)

    def _place(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file under a name of its own, then give it its name, whatever other runs are doing."""
        temporary = self.folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        try:
            write(temporary)
            flush(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _open(self, path: Path, *, verify: bool = True) -> _File:
        """Map a file into memory.

        Raises:
            DamagedError: says what is wrong with it.
        """
        with safe_open(path, framework="np") as file:
            metadata, keys = file.metadata() or {}, file.get_tensor("keys")
            shape = tuple(file.get_slice("values").get_shape())
        if metadata.get("context") != self.context:
            raise DamagedError("it was made in another way than this folder says")
        if shape != (len(keys), *self.shape):
            raise DamagedError(f"its values are of shape {shape}, expected {(len(keys), *self.shape)}")
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            start = 8 + header + json.loads(file.read(header))["values"]["data_offsets"][0]
        values = np.memmap(path, np.uint8, "r", start, (len(keys), self.row_bytes))
        if verify and _digest(keys, values) != metadata.get("digest"):
            raise DamagedError("its content is not what was written")
        return _File(np.ascontiguousarray(keys).view(KEY).reshape(-1), values)

    def _index(self) -> None:
        keys = np.concatenate([np.empty(0, KEY), *(file.keys for file in self._files)])
        self._starts = np.cumsum([0, *(len(file.keys) for file in self._files)])
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def _remove_abandoned(self) -> None:
        for path in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            with suppress(FileNotFoundError):  # the other run has just finished it
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                    path.unlink()


def _digest(keys: npt.NDArray[np.uint8], values: npt.NDArray[np.uint8]) -> str:
    digest = hashlib.blake2b(np.ascontiguousarray(keys).data, digest_size=16)
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
