"""One run at a time in an output folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sd_memguard.runs.folder import RunFolderError
from sd_memguard.runs.lock import run_lock
from sd_memguard.training.trainer import train

HOLD = """
import sys, time
from pathlib import Path
from sd_memguard.runs.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_told_who_holds_the_folder(holder, tmp_path, configure):
    with pytest.raises(RunFolderError, match=f"in use by another run .process {holder.pid} on "):
        train(configure(tmp_path))
    assert not (tmp_path / "model_index.json").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_dead_run_holds_nothing(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with run_lock(tmp_path):
        assert (tmp_path / "memguard" / "lock.json").exists()
    assert not (tmp_path / "memguard" / "lock.json").exists()


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        raise ZeroDivisionError
    with run_lock(tmp_path):
        assert (tmp_path / "memguard" / "lock.json").exists()


def test_two_folders_do_not_disturb_each_other(holder, tmp_path):
    with run_lock(tmp_path / "other"):
        folders = (tmp_path, tmp_path / "other")
        owners = [json.loads((folder / "memguard" / "lock.json").read_text()) for folder in folders]
    assert [owner["process"] for owner in owners] == [holder.pid, os.getpid()]
