"""The limits of containers and jobs, played by the files in which Linux tells of them."""

from types import SimpleNamespace

import psutil
import pytest

from sd_memguard.errors import ConfigError
from sd_memguard.host_memory import available_memory
from sd_memguard.training import memory_estimate
from sd_memguard.training.memory_estimate import fits_in_ram

GB = 10**9


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Return a function that writes the files of a system with 100 GB free, and returns its root."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GB))

    def write(membership: str, files: dict[str, str]):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(membership)
        for name, content in files.items():
            file = tmp_path / "sys/fs/cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        return tmp_path

    return write


def group(folder: str, limit: object, usage: int, inactive: int = 0) -> dict[str, str]:
    stat = f"anon 1\ninactive_file {inactive}\n"
    files = {"memory.max": f"{limit}\n", "memory.current": f"{usage}\n", "memory.stat": stat}
    return {f"{folder}{name}": content for name, content in files.items()}


def test_a_container_has_what_its_limit_leaves(system):
    root = system("0::/\n", group("", 16 * GB, 10 * GB, inactive=4 * GB))
    assert available_memory(root) == 10 * GB  # of what it uses, 4 GB are files that are read no more


def test_a_job_has_what_the_tightest_of_its_groups_leaves(system):
    job = {
        **group("", "max", 90 * GB),
        **group("slurm/job_7/", 32 * GB, 8 * GB),
        **group("slurm/job_7/step_0/", "max", 8),
    }
    assert available_memory(system("0::/slurm/job_7/step_0\n", job)) == 24 * GB


@pytest.mark.parametrize("folder", ["memory/", "memory/docker/abc/"])
def test_version_1_of_cgroups_is_read_too(system, folder):
    files = {"memory.limit_in_bytes": "8000000000", "memory.usage_in_bytes": "1000000000", "memory.stat": "cache 5\n"}
    root = system("4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n", {f"{folder}{n}": t for n, t in files.items()})
    assert available_memory(root) == 7 * GB


def test_without_limits_the_machine_s_memory_counts(system, tmp_path):
    assert available_memory(tmp_path / "no-such-system") == 100 * GB
    assert (
        available_memory(system("0::/\n", {"memory.max": "no number", "memory.stat": "", "memory.current": "1"}))
        == 100 * GB
    )


def test_proxies_rest_on_disk_where_the_container_is_too_small(configure, monkeypatch):
    monkeypatch.setattr(memory_estimate, "available_memory", lambda: 4 * GB)
    assert fits_in_ram(2 * GB, configure())
    assert not fits_in_ram(3 * GB, configure())
    with pytest.raises(ConfigError, match=r"5\.0 GB of memory .* 4\.0 GB are free"):
        fits_in_ram(5 * GB, configure(proxy_store="ram"))
