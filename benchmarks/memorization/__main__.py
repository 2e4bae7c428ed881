"""Fine-tune the bundled model in many ways with one budget and write a small JSON file for each point along the way.

    python -m benchmarks.memorization --work_dir runs/memorization

    python -m benchmarks.memorization --quick --work_dir runs/quick

A point that is there already (``cells/ARM-STEPS-SEED.json``) is not made again, and an interrupted fine-tune goes on
from its newest checkpoint, so the command can be stopped and started at will. `table.py` makes the tables of the cells.
`--quick` makes the ends of six arms again, into a folder of its own, and says whether they come out as published.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.memorization.arms import ARMS, COMMON
from benchmarks.memorization.data import training_folder
from benchmarks.memorization.judge import Exam, judge, prepare_exam
from benchmarks.memorization.quick import QUICK_ARMS, report
from benchmarks.memorization.table import read_cells
from sd_memguard.assets import tiny_sd_path
from sd_memguard.config import TrainConfig, make_train_config
from sd_memguard.console import configure_logging
from sd_memguard.proxies.state_file import load_state
from sd_memguard.runs.checkpoint import list_checkpoints
from sd_memguard.training.trainer import train

CELLS = Path(__file__).parent / "cells"
SECONDS = "cpu_seconds.json"
"""A file in a run's folder."""


def main() -> None:
    """Train and judge what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="where the runs go; may be removed afterwards")
    parser.add_argument("--quick", action="store_true", help="one seed of six arms, compared with the published cells")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all, or those of --quick")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one fine-tune of each arm per seed")
    parser.add_argument("--max_train_steps", type=int, default=900, help="optimizer steps of each fine-tune")
    parser.add_argument("--points", type=int, help="points along the training that are judged; default: 3, --quick: 1")
    parser.add_argument("--cells", type=Path, help="where the results are; default: beside the code, --quick: work_dir")
    parser.add_argument("--train_only", action="store_true", help="leave the judging to a later run of the command")
    options = parser.parse_args()
    options.arms = options.arms or list(QUICK_ARMS if options.quick else ARMS)
    options.points = options.points or (1 if options.quick else 3)
    options.cells = options.cells or (options.work_dir / "cells" if options.quick else CELLS)
    configure_logging()
    options.cells.mkdir(parents=True, exist_ok=True)
    exam = None if options.train_only else prepare_exam()
    for seed in options.seeds:
        for arm in options.arms:
            run_arm(arm, seed, options, exam)
    if options.quick and not options.train_only:
        print("\n".join(report(read_cells(options.cells), read_cells(CELLS))))


def run_arm(arm: str, seed: int, options: argparse.Namespace, exam: Exam | None) -> None:
    """Train one arm with one seed and judge its checkpoints, as far as that has not been done."""
    if arm == "base":
        if exam is not None:
            judge_base(options, exam)
        return
    every = options.max_train_steps // options.points
    files = {
        step: cell_file(options.cells, arm, step, seed) for step in range(every, every * options.points + 1, every)
    }
    config = configuration(arm, seed, every, options)
    folder = Path(config.output_dir)
    if not all(file.exists() for file in files.values()) and not (folder / "model_index.json").exists():
        train_timed(config)
    if exam is None:
        return
    for checkpoint in list_checkpoints(folder):
        step = int(checkpoint.name.rpartition("-")[2])
        if step in files and not is_complete(files[step]):
            judged = judge(exam, checkpoint / "unet", folder / f"generated images-{step}.safetensors", f"{arm} {step}")
            if files[step].exists():  # made before all that is judged now was
                cell = json.loads(files[step].read_text(encoding="utf-8")) | judged
            else:
                cell = describe(arm, seed, step, checkpoint, options) | judged
            write_cell(files[step], cell)
    for checkpoint in list_checkpoints(folder):
        for part in (path for path in checkpoint.iterdir() if path.name != "unet"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()


def train_timed(config: TrainConfig) -> None:
    """Train, and write down the processor seconds of the whole run; null where it went on from a checkpoint."""
    folder, start = Path(config.output_dir), time.process_time()
    fresh = not list_checkpoints(folder)
    train(config)
    (folder / SECONDS).write_text(json.dumps(round(time.process_time() - start) if fresh else None), encoding="utf-8")


def judge_base(options: argparse.Namespace, exam: Exam) -> None:
    """Judge the model as it is before any fine-tune, which is step 0 of every arm."""
    file = cell_file(options.cells, "base", 0, 0)
    if is_complete(file):
        return
    about = {"arm": "base", "title": ARMS["base"].title, "seed": 0, "step": 0, "settings": {}, "data": "demo"}
    costs = {"extra_steps": 0, "empty_steps": 0, "image_forwards": 0, "cpu_seconds_of_run": 0}
    command = "python -m benchmarks.memorization --arms base --work_dir runs/memorization"
    write_cell(
        file,
        about
        | {"command": command, "commit": commit(), **costs}
        | judge(exam, tiny_sd_path() / "unet", options.work_dir / "generated images-base.safetensors", "base"),
    )


def is_complete(file: Path) -> bool:
    """Return whether a cell is there with all that is judged now."""
    return file.exists() and "recognized" in json.loads(file.read_text(encoding="utf-8"))


def write_cell(file: Path, cell: dict[str, Any]) -> None:
    """Write a cell and say what is in it."""
    file.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
    shares = {kind: one["copies"] for kind, one in cell["copies"].items()}
    print(
        file.stem,
        shares,
        cell["losses"]["heldout"]["mean"],
        cell["kid"]["mean"],
        cell["kid_latents"]["mean"],
        flush=True,
    )


def cell_file(cells: Path, arm: str, step: int, seed: int) -> Path:
    """Return the file of one point."""
    return cells / f"{arm}-{step}-{seed}.json"


def configuration(arm: str, seed: int, checkpointing_steps: int, options: argparse.Namespace) -> TrainConfig:
    """Return the settings of one fine-tune."""
    return make_train_config(
        **COMMON,
        **ARMS[arm].settings,
        train_data_dir=str(training_folder(ARMS[arm].data, options.work_dir)),
        max_train_steps=options.max_train_steps,
        checkpointing_steps=checkpointing_steps,
        output_dir=str(options.work_dir / f"{arm}-{seed}"),
        resume_from_checkpoint="latest",
        seed=seed,
    )


def describe(arm: str, seed: int, step: int, checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what made a point and what it cost."""
    progress = load_state(checkpoint / "memguard", "state")["progress"]
    weights = (checkpoint / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    seconds = checkpoint.parent / SECONDS
    return {
        "arm": arm,
        "title": ARMS[arm].title,
        "seed": seed,
        "step": step,
        "settings": COMMON | ARMS[arm].settings,
        "data": ARMS[arm].data,
        "command": f"python -m benchmarks.memorization --arms {arm} --seeds {seed} "
        f"--max_train_steps {options.max_train_steps} --points {options.points} --work_dir runs/memorization",
        "commit": commit(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "unet_sha256": hashlib.sha256(weights).hexdigest(),
        "extra_steps": sum(progress["extra_steps"]),
        "empty_steps": progress["empty_steps"],
        "image_forwards": progress["image_forwards"],
        "cpu_seconds_of_run": json.loads(seconds.read_text(encoding="utf-8")) if seconds.exists() else None,
    }


def commit() -> str:
    """Return the commit of the working tree."""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
