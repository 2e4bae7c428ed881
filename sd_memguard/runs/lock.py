"""One run at a time in an output folder."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from sd_memguard.runs.folder import FOLDER, RunFolderError

LOCK, HOLDER = "lock", "lock.json"


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Hold the run folder for the block, so that no other run writes there.

    The lock is the operating system's (`flock`), which frees it when the process ends, however it ends: what a dead
    run leaves behind is no lock. It holds between machines as far as their shared file system supports `flock`
    (NFS 4 does). Who holds it is written beside it, for the message.

    Raises:
        RunFolderError: another run holds it.
    """
    folder = output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunFolderError(
            f"`--output_dir` {output_dir} is in use by another run{_holder(folder / HOLDER)}; wait for it, stop it, or "
            "name another folder"
        ) from None
    try:
        _write_holder(folder / HOLDER)
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _write_holder(file: Path) -> None:
    holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat("T", "seconds"),
    }
    file.write_text(json.dumps(holder), encoding="utf-8")


def _holder(file: Path) -> str:
    """Return who holds the lock in brackets, nothing where that cannot be read (it is just being written)."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
        return f" (process {holder['process']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError):
        return ""
