"""Who trains what, what is taken for an echo of a signal, and folders that are not shared."""

import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from sd_memguard.distributed import Exchange
from sd_memguard.runs.folder import RunFolderError
from sd_memguard.training.distributed_start import check_shared
from sd_memguard.training.ranks import Ranks
from sd_memguard.training.signals import StopRequest


def process(rank: int, size: int) -> Exchange:
    exchange = Exchange(alone=True)
    exchange.rank, exchange.size = rank, size
    return exchange


@pytest.mark.parametrize(
    ("size", "num_shards", "shards_of_the_second", "slices"),
    [(2, 2, [1], 1), (2, 6, [1, 3, 5], 1), (4, 8, [1, 5], 1), (4, 6, range(6), 4), (2, 1, [0], 2), (3, 2, [0, 1], 3)],
)
def test_shards_are_divided_where_they_can_be(size, num_shards, shards_of_the_second, slices):
    ranks = Ranks(process(1, size), num_shards, slice_size=3)
    assert list(ranks.shards) == list(shards_of_the_second)
    assert ranks.slices == slices
    assert ranks.by_shard == (slices == 1)
    batch = list(range(3 * slices))
    taken = [Ranks(process(rank, size), num_shards, slice_size=3).slice_of(batch) for rank in range(size)]
    assert [one for part in taken for one in part] == batch * (1 if ranks.by_batch else size)


def test_resting_proxies_are_counted_for_each_machine(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Ranks(process(0, 4), 8, slice_size=1).local_stores == 0.5
    assert Ranks(process(0, 4), 6, slice_size=1).local_stores == 2
    assert Ranks(process(0, 1), 6, slice_size=1).local_stores == 1


def test_the_echo_of_a_signal_does_not_abort():
    with StopRequest(echo=60) as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
    assert stop.received == signal.SIGUSR1
    with StopRequest(), pytest.raises(KeyboardInterrupt):  # noqa: PT012 (the second one raises)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    (tmp_path / "memguard").mkdir()
    other = SimpleNamespace(size=2, rank=1, is_main=False, wait=lambda purpose: None, agreed=nullcontext)
    other.share = lambda value, purpose: "the word of the main process"
    with pytest.raises(RunFolderError, match="process 1"):
        check_shared(tmp_path, other)
    (tmp_path / "memguard/processes").write_text("the word of the main process")
    check_shared(tmp_path, other)
