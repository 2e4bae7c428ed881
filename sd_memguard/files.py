"""Writing files whole or not at all, and words for sizes."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

TEMPORARY_PREFIX = "writing-"
"""What the name of a file or folder begins with while it is written."""


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it: whoever looks sees the old file or the new one, never a part.

    Args:
        path: the file.
        write: writes the new content to the path it is given.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    write(temporary)
    flush(temporary)
    os.replace(temporary, path)


def flush(path: Path) -> None:
    """Have the system write a file to the disk; Windows does that for files alone that are open for writing."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replace a text file as ``replace_file`` does."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that is never written to again a second name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def nearest_folder(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return folder if folder.exists() else nearest_folder(folder.parent)


def user_cache_folder() -> Path:
    """Return this program's folder among the user's caches; everything in it can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd_memguard"


def gigabytes(size: float) -> str:
    """Return a number of bytes to read, in MB where it is less than a tenth of a GB.

    >>> gigabytes(3.44e9), gigabytes(3.44e6), gigabytes(3.44e3)
    ('3.4 GB', '3.4 MB', '0.0 MB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
