"""Where offloaded proxies wait: in RAM, or on disk as immutable safetensors files that checkpoints hard-link."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_memguard.distributed import ProcessGroup
from sd_memguard.errors import UserError
from sd_memguard.files import link_or_copy

logger = logging.getLogger(__name__)

STORE_FOLDER, MARK, SUFFIX = "memguard-proxies", "a-store-of-proxies.txt", ".safetensors"


class ProxyStore(Protocol):
    """Immutable named entries, each a mapping of names to CPU tensors."""

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry; a key is used once."""

    def get(self, key: str) -> Mapping[str, Tensor]:
        """Return an entry; its tensors may be read one at a time and must not be changed."""

    def drop(self, key: str) -> None:
        """Forget an entry."""

    def write(self, key: str, path: Path) -> None:
        """Write an entry to a safetensors file that no later change of the store touches."""

    def adopt(self, key: str, path: Path) -> None:
        """Take an entry over from a safetensors file, which stays as it is."""


class RamStore:
    """Entries in host memory."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Tensor]] = {}

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors to host memory, contiguous as files want them."""
        self._entries[key] = {
            name: tensors[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name in tensors
        }

    def get(self, key: str) -> Mapping[str, Tensor]:
        """Return the entry itself."""
        return self._entries[key]

    def drop(self, key: str) -> None:
        """Free the entry."""
        del self._entries[key]

    def write(self, key: str, path: Path) -> None:
        """Write the entry to a file."""
        save_file(self._entries[key], path)

    def adopt(self, key: str, path: Path) -> None:
        """Read the file, into memory of its own: ``load_file`` maps the file, which Windows would then not remove."""
        self._entries[key] = {name: tensor.clone() for name, tensor in load_file(path).items()}


class StoreError(UserError):
    """The folder for proxies holds what does not belong there."""


class DiskStore:
    """Entries as safetensors files in ``memguard-proxies``, a folder of their own in the given one.

    Nothing is touched there before the first entry comes. Then what an earlier store has left is removed.

    Args:
        folder: where to make the store's folder; made where it is missing.

    Raises:
        StoreError: the store's folder holds something that no store has written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / STORE_FOLDER
        self._is_ready = False
        self._refuse_foreign()

    def _refuse_foreign(self) -> None:
        found = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
        foreign = [name for name in found if name != MARK and (MARK not in found or not name.endswith(SUFFIX))]
        if foreign:
            raise StoreError(
                f"{self.folder} is where proxies wait, and what is in it is deleted, but {foreign[0]} was not written "
                "by a store of proxies; move it away, or name another folder"
            )

    def _make_ready(self) -> None:
        """Make the folder, or empty it, before the first entry."""
        if self._is_ready:
            return
        self._is_ready = True
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"*{SUFFIX}"):
            path.unlink()
        text = "Proxies of a training that is under way; deleted when another one begins.\n"
        (self.folder / MARK).write_text(text, encoding="utf-8")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors to a file."""
        self._make_ready()
        save_file(apart(tensors), self._path(key))

    def get(self, key: str) -> Mapping[str, Tensor]:
        """Return the entry as a mapping that reads a tensor when asked for it."""
        return LazyTensors(self._path(key))

    def drop(self, key: str) -> None:
        """Remove the file; hard links to it in checkpoints keep its content."""
        try:
            self._path(key).unlink()
        except PermissionError:  # Windows, while somebody still reads it; the next store will
            logger.debug("%s is left for the next run to remove", self._path(key))

    def write(self, key: str, path: Path) -> None:
        """Hard-link the entry, or copy it where the file system has no links."""
        link_or_copy(self._path(key), path)

    def adopt(self, key: str, path: Path) -> None:
        """Hard-link the file, or copy it where the file system has no links."""
        self._make_ready()
        link_or_copy(path, self._path(key))


class SharedDiskStore(DiskStore):
    """A disk store of processes that all have the same proxies: the main one writes, and the others wait for it.

    All processes put, drop and adopt the same entries in the same order.

    Args:
        folder: the folder, seen by all of them.
        exchange: the processes.
    """

    def __init__(self, folder: Path, exchange: ProcessGroup) -> None:
        self._exchange = exchange
        with exchange.raise_on_any_rank():
            super().__init__(folder)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors to a file."""
        if self._exchange.is_main:
            super().put(key, tensors)
        self._exchange.barrier("store")

    def drop(self, key: str) -> None:
        """Remove the file, when no process reads it any more."""
        self._exchange.barrier("store")
        if self._exchange.is_main:
            super().drop(key)

    def adopt(self, key: str, path: Path) -> None:
        """Hard-link the file, or copy it where the file system has no links."""
        if self._exchange.is_main:
            super().adopt(key, path)
        self._exchange.barrier("store")


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the host as safetensors takes them: contiguous, and none of them in the memory of another.

    The 8-bit AdamW of bitsandbytes gives all parameters one table of its steps, which on the CPU is not copied.
    """
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for name in tensors:
        tensor = tensors[name].detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        if place in places:
            tensor = tensor.clone()
        places.add(place)
        found[name] = tensor
    return found


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._names)
