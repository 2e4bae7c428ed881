"""Who trains what, what is taken for an echo of a signal, and folders that are not shared."""

import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from sd_memguard.distributed import ProcessGroup, ProcessLostError
from sd_memguard.errors import UserError
from sd_memguard.runs.folder import RunFolderError
from sd_memguard.training import distributed_start
from sd_memguard.training.distributed_start import check_shared, hard_exit, leaving_together
from sd_memguard.training.ranks import Ranks
from sd_memguard.training.signals import Interrupted, StopRequest


def process(rank: int, size: int) -> ProcessGroup:
    exchange = ProcessGroup(alone=True)
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
    other = SimpleNamespace(size=2, rank=1, is_main=False, barrier=lambda purpose: None, raise_on_any_rank=nullcontext)
    other.broadcast_object = lambda value, purpose: "the word of the main process"
    with pytest.raises(RunFolderError, match="process 1"):
        check_shared(tmp_path, other)
    (tmp_path / "memguard/processes").write_text("the word of the main process")
    check_shared(tmp_path, other)


# An error in one of several processes. The others wait in a collective; NCCL's `destroy_process_group` is one, too.


@pytest.fixture
def destroyed(monkeypatch):
    """Return how often the process group was taken down."""
    calls = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda *group: calls.append("destroyed"))
    return calls


def test_a_run_that_meets_an_error_leaves_the_process_group_alone(run, monkeypatch, destroyed):
    def fail(trainer, *args):
        raise ZeroDivisionError

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *group: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 1)
    monkeypatch.setattr("sd_memguard.training.trainer.Trainer.step", fail)
    with pytest.raises(ZeroDivisionError):
        run(max_train_steps=3)
    assert destroyed == []


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_process_group_is_taken_down_when_all_have_come_to_the_end(destroyed, is_stopped):
    other = process(1, 2)
    other.barrier = lambda purpose: destroyed.append(f"waited: {purpose}")
    with pytest.raises(Interrupted) if is_stopped else nullcontext(), leaving_together(other):
        if is_stopped:
            raise Interrupted(143)
    assert destroyed == ["waited: end", "destroyed"]


def test_after_an_error_nobody_is_waited_for(destroyed):
    other = process(1, 2)
    other.barrier = lambda purpose: destroyed.append(purpose)
    with pytest.raises(OSError, match="gone"), leaving_together(other):
        raise OSError("gone")
    assert destroyed == []


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ZeroDivisionError("one rank's own"), 1, "Traceback"),
        (UserError("no such folder"), 2, "error: no such folder"),
        (Interrupted(143), 143, ""),
    ],
)
def test_one_of_several_processes_ends_at_once_with_its_error(monkeypatch, capsys, error, status, said):
    def ended(code):
        raise SystemExit(f"hard exit {code}")

    monkeypatch.setattr(distributed_start.os, "_exit", ended)
    with pytest.raises(type(error)), hard_exit():  # alone it ends as any program does
        raise error
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=f"hard exit {status}"), hard_exit():
        raise error
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "is_loss"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
    ],
)
def test_errors_of_this_process_do_not_pass_for_a_lost_one(monkeypatch, error, is_loss):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    with pytest.raises(ProcessLostError if is_loss else type(error)) as raised:
        process(0, 2).all_reduce(torch.ones(1), "test")
    assert isinstance(raised.value, ProcessLostError) == is_loss


BLOCKED = """
import ctypes, os, signal, threading, time
from sd_memguard.training.signals import StopRequest

libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
with StopRequest(echo=10.0, grace=0.5) as stop:
    {wait}
print(stop.received)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="blocks in a call of the C library of Linux")
@pytest.mark.parametrize(
    ("wait", "status"),
    [
        # A mutex locked twice never returns, and signals do not interrupt it: as NCCL waits for a process that is gone.
        ("libc.pthread_mutex_lock(mutex), libc.pthread_mutex_lock(mutex)", 128 + signal.SIGTERM),
        ("[time.sleep(0.1) for _ in range(20)]", 0),
    ],
)
def test_a_signal_ends_a_process_whose_collective_never_returns(wait, status):
    ended = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(wait=wait)], timeout=120, capture_output=True, text=True
    )
    assert ended.returncode == status
    assert ended.stdout.strip() == ("" if status else str(signal.SIGTERM))
