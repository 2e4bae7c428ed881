"""What the audit has computed already, kept by content: the same input is never computed twice, also after a kill."""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 512
"""Rows computed, written and read at a time; an interrupted audit loses at most so many."""


def digest(*parts: object) -> str:
    """Return a hash of the texts of these parts in order, 64 hexadecimal digits."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode("utf-8", "surrogatepass")).hexdigest()


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Store:
    """Rows of numbers and files under a folder, each named by a hash of what it was made from.

    Args:
        folder: Made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def blocks(self, kind: str, keys: Sequence[str], compute: Callable[[range], Tensor]) -> list[Tensor]:
        """Return a row for each key, in blocks that are memory-mapped from the store; what is missing is computed.

        Args:
            kind: What the rows are, and everything besides the key that decides their values.
            keys: N names of contents.
            compute: Takes positions among the keys to as many rows of numbers.

        Returns:
            Tensors of ``BLOCK_ROWS`` rows, the last one shorter.
        """
        found = []
        for start in range(0, len(keys), BLOCK_ROWS):
            rows = range(start, min(start + BLOCK_ROWS, len(keys)))
            file = self.folder / "rows" / f"{digest(kind, *keys[rows.start : rows.stop])[:32]}.npy"
            if (block := _read(file, len(rows))) is None:
                values = compute(rows).cpu().contiguous().numpy()
                self._keep(file, partial(_write_array, values))
                block = _read(file, len(rows))
                assert block is not None
            found.append(block)
        return found

    def rows(self, kind: str, keys: Sequence[str], compute: Callable[[range], Tensor]) -> Tensor:
        """Return what ``blocks`` returns as one tensor in memory."""
        return torch.cat(self.blocks(kind, keys, compute))

    def has_file(self, key: str) -> bool:
        """Return whether a file is kept under this key."""
        return self.file(key).is_file()

    def keep_file(self, key: str, write: Callable[[Path], None]) -> None:
        """Keep what ``write`` writes to the path that it is given."""
        self._keep(self.file(key), write)

    def place_file(self, key: str, target: Path) -> None:
        """Put a kept file at ``target`` as well, as a hard link where the file system has them."""
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(self.file(key), target)
        except OSError:
            shutil.copyfile(self.file(key), target)

    def file(self, key: str) -> Path:
        """Return where the file of this key is kept."""
        return self.folder / "files" / key[:32]

    def _keep(self, file: Path, write: Callable[[Path], None]) -> None:
        """Write under another name first, so that a file that is there is whole."""
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".unfinished-{os.getpid()}-{file.name}")
        try:
            write(unfinished)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)


def _write_array(values: np.ndarray, path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, values, allow_pickle=False)


def _read(file: Path, num_rows: int) -> Tensor | None:
    """Return a block, or None where it is missing or damaged."""
    try:
        # Copy on write: torch wants writable memory, and the file must not change.
        block = torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None
    return block if len(block) == num_rows else None
