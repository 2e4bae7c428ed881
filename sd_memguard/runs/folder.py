"""The files of ``memguard/`` in a run folder: their names, how they are replaced, and how they are read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

from sd_memguard.core.rules import Action
from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.errors import UserError

FOLDER = "memguard"
CONFIG, ROUNDS, SAMPLES, BANKS, SUMMARY = (
    "config.json",
    "rounds.jsonl",
    "samples.parquet",
    "banks.safetensors",
    "summary.json",
)
PROXIES_FOLDER = "proxies"
BEST = "best"
"""Folder of the best model so far, in a run and in its checkpoints."""
ADAPTER = "adapter.safetensors"
"""The adapter of a run or checkpoint, where it is of another kind than LoRA."""
ACTIONS = "actions"
"""What ``config.json`` calls the fields of each ``Action`` of the sample rule."""


class RunFolderError(UserError):
    """A folder that holds no run, or cannot be used for one."""


@dataclass(frozen=True, eq=False)
class Bank:
    """A proxy's memory bank, (T,) each: mean loss (NaN where nothing was seen) and times seen at each timestep."""

    mean: npt.NDArray[np.float32]
    times_seen: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RunFolder:
    """What a run, finished or not, has written down.

    Attributes:
        path: the run folder.
        config: every setting, with ``auto`` resolved, and the actions of the sample rule.
        rounds: the rows of ``rounds.jsonl``, none before the first round has ended.
        samples: ``samples.parquet``, None where there is none.
        banks: one for each proxy, none where there is no such file.
        summary: how the run ended, empty before that.
        notices: what is missing or damaged, a sentence each.
    """

    path: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    samples: pa.Table | None
    banks: list[Bank]
    summary: dict[str, Any]
    notices: list[str]

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return int(self.config["num_shards"])

    @property
    def num_rounds(self) -> int:
        """Number of rounds of the whole run."""
        return RoundSchedule.plan(
            self.config["max_train_steps"], self.num_shards, self.config["steps_per_round"], redistributes=False
        ).num_rounds

    @property
    def actions(self) -> list[Action]:
        """What the sample rule could do with a sample besides a clean update."""
        return [Action(**action) for action in self.config[ACTIONS]]

    @property
    def columns(self) -> list[str]:
        """The columns of ``samples.parquet`` that count how often each action was taken."""
        return [action.column for action in self.actions]

    @property
    def prone_columns(self) -> list[str]:
        """Those of them that count towards the skip ratio."""
        return [action.column for action in self.actions if action.memory_prone]

    @property
    def is_guarded(self) -> bool:
        """Whether the memorization guard was on."""
        return self.config.get("memguard") != "off"

    @property
    def is_finished(self) -> bool:
        """Whether the pipeline was written, or the script that the launcher has run was at its end."""
        ended = bool(self.summary) if "script" in self.config else (self.path / "model_index.json").exists()
        return ended and (len(self.rounds) >= self.num_rounds or bool(self.summary.get("stopped_early")))


def read_run(path: Path) -> RunFolder:
    """Return what a run folder tells; files that are missing or damaged are named in its notices.

    Raises:
        RunFolderError: the folder holds no run.
    """
    folder = path / FOLDER
    config = _read_config(path)
    notices: list[str] = []

    def attempt(name: str, read: Callable[[Path], Any], missing: Any, why: str) -> Any:
        file = folder / name
        if not file.exists():
            notices.extend([f"There is no {FOLDER}/{name}: {why}"] if why else [])
            return missing
        try:
            return read(file)
        except (OSError, ValueError, KeyError, pa.ArrowException, safetensors.SafetensorError) as error:
            notices.append(f"{FOLDER}/{name} is damaged and ignored ({type(error).__name__}: {error})")
            return missing

    rounds, broken = attempt(ROUNDS, _read_rounds, ([], None), "the first round has not ended yet.")
    if broken is not None:
        notices.append(f"{FOLDER}/{ROUNDS} is damaged from line {broken} on; the lines before are shown.")
    old = "this run was made before banks were kept there; the rest is shown." if rounds else ""
    return RunFolder(
        path,
        config,
        rounds,
        samples=attempt(SAMPLES, lambda file: _read_samples(file, config[ACTIONS]), None, ""),
        banks=attempt(BANKS, lambda file: _read_banks(file, int(config["num_shards"])), [], old),
        summary=attempt(SUMMARY, lambda file: dict(json.loads(file.read_text(encoding="utf-8"))), {}, ""),
        notices=notices,
    )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / FOLDER / CONFIG
    if (path / FOLDER / "state.json").exists():
        raise RunFolderError(f"{path} is a checkpoint, not a run; name the run folder, {path.resolve().parent}")
    if not file.exists():
        fault = f"holds no {FOLDER}/{CONFIG}" if path.is_dir() else ("is a file" if path.exists() else "does not exist")
        raise RunFolderError(
            f"{path} is no run folder: it {fault}; name the `--output_dir` of a training with sd-memguard"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        for name in ("num_shards", "steps_per_round", "max_train_steps"):
            if not isinstance(config[name], int) or config[name] < 1:
                raise ValueError(f"`{name}` is {config[name]!r}")
        for action in config[ACTIONS]:
            Action(**action)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{file} cannot be read ({type(error).__name__}: {error}); name the folder of another run"
        ) from error
    return dict(config)


def _read_rounds(file: Path) -> tuple[list[dict[str, Any]], int | None]:
    """Return the rows, and the number of the first line that is none."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            if row["round"] != number or not isinstance(row["shards"], list):
                return rows, number
        except (ValueError, KeyError, TypeError):
            return rows, number
        rows.append(row)
    return rows, None


def _read_samples(file: Path, actions: list[dict[str, str]]) -> pa.Table:
    counts = [action["column"] for action in actions]
    return pq.read_table(file).select(["sample_id", "file", "caption", "shard", "seen", *counts, "moves", "skip_ratio"])


def _read_banks(file: Path, num_shards: int) -> list[Bank]:
    """Return the memory banks, none where the sample rule keeps no running mean of the loss."""
    tensors = safetensors.numpy.load_file(file)
    if not any(name.endswith(".mean") for name in tensors):
        return []
    return [Bank(tensors[f"shard_{k}.mean"], tensors[f"shard_{k}.times_seen"]) for k in range(num_shards)]
