"""Reading a run folder, whole or not, and replacing its files so that a kill leaves none in part."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sd_memguard.core.schedule import round_mean
from sd_memguard.files import replace_file, replace_text
from sd_memguard.runs.folder import RunFolderError, read_run

ROOT = Path(__file__).parents[2]
ACTIONS = [{"name": "skip", "column": "skipped"}]
CONFIG = {"num_shards": 2, "steps_per_round": 5, "max_train_steps": 25, "memguard": "on", "actions": ACTIONS}


@pytest.fixture
def folder(tmp_path):
    """Return a run folder with a config and nothing else."""
    (tmp_path / "run/memguard").mkdir(parents=True)
    (tmp_path / "run/memguard/config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "run"


def shard(**values):
    return {"shard": 0, "steps": 1, "loss": 0.5, **values}


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "rounds.jsonl"
    replace_text(file, "old")

    def write_half(path: Path) -> None:
        path.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(file, write_half)
    assert file.read_text() == "old"
    replace_text(file, "new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.jsonl"]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from sd_memguard.files import replace_file\n"
        "def write(path):\n"
        "    path.write_text('ne')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "replace_file(Path(sys.argv[1]), write)\n"
    )
    file = tmp_path / "rounds.jsonl"
    file.write_text("old")
    done = subprocess.run([sys.executable, "-c", program, str(file)], cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert file.read_text() == "old"


def test_what_is_no_run_is_refused(tmp_path, folder):
    with pytest.raises(RunFolderError, match="does not exist"):
        read_run(tmp_path / "nothing")
    with pytest.raises(RunFolderError, match=r"holds no memguard/config\.json"):
        read_run(tmp_path)
    with pytest.raises(RunFolderError, match="is a file"):
        read_run(folder / "memguard/config.json")
    checkpoint = folder / "checkpoint-5"
    (checkpoint / "memguard").mkdir(parents=True)
    (checkpoint / "memguard/state.json").write_text("{}")
    with pytest.raises(RunFolderError, match=f"is a checkpoint, not a run; name the run folder, {folder}"):
        read_run(checkpoint)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        json.dumps({**CONFIG, "num_shards": "auto"}),
        json.dumps({**CONFIG, "actions": [{"name": "skip"}]}),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(folder, text):
    (folder / "memguard/config.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"config\.json cannot be read"):
        read_run(folder)


def test_a_run_before_its_first_round(folder):
    run = read_run(folder)
    assert (run.rounds, run.samples, run.banks, run.summary) == ([], None, [], {})
    assert run.num_rounds == 3  # 13 and 12 steps of two proxies in rounds of five
    assert not run.is_finished
    assert run.notices == ["There is no memguard/rounds.jsonl: the first round has not ended yet."]


def test_damaged_files_are_named_and_the_rest_is_read(folder):
    rows = [{"round": number, "kind": "average", "shards": [shard()]} for number in (1, 2)]
    lines = [json.dumps(row) for row in rows]
    (folder / "memguard/rounds.jsonl").write_text("\n".join([*lines, lines[0][:-9]]))
    (folder / "memguard/samples.parquet").write_bytes(b"PAR1 not at all")
    (folder / "memguard/banks.safetensors").write_bytes(b"\0")
    (folder / "memguard/summary.json").write_text("{")
    run = read_run(folder)
    assert run.rounds == rows
    assert (run.samples, run.banks, run.summary) == (None, [], {})
    text = "\n".join(run.notices)
    assert "rounds.jsonl is damaged from line 3 on" in text
    for name in ("samples.parquet", "banks.safetensors", "summary.json"):
        assert f"{name} is damaged and ignored" in text


def test_samples_with_other_columns_are_left_out(folder):
    pq.write_table(pa.table({"file": ["a.png"]}), folder / "memguard/samples.parquet")
    run = read_run(folder)
    assert run.samples is None
    assert "samples.parquet is damaged" in run.notices[-1]


def test_the_mean_over_shards_weighs_steps():
    row = {"shards": [shard(steps=3, loss=1.0), shard(steps=1, loss=2.0), shard(steps=0, loss=None)]}
    assert round_mean(row, "loss") == 1.25
    assert round_mean({"shards": [shard(loss=None)]}, "loss") is None
