"""How much memory of the host is left to this process: a container or a job may have less than the machine."""

from collections.abc import Iterator
from pathlib import Path

import psutil


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still take, by the machine and by every cgroup that it is in.

    Args:
        root: of the file system that holds `proc` and `sys`, where these exist.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_in_cgroups(root)]))


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Yield what each limit leaves; the page cache that a group holds is given up when its memory is needed."""
    for folder, (limit, usage, inactive) in _groups(root):
        try:
            text = (folder / limit).read_text().strip()
            if text == "max":
                continue
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield int(text) - int((folder / usage).read_text()) + int(stat.get(inactive, 0))
        except (OSError, ValueError):
            continue  # no such limit here


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the folders of this process's groups and of those above them, with the names of their files.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A container may see the path of the host, of which only the top is mounted.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            yield top.joinpath(*parts[:depth]), files
