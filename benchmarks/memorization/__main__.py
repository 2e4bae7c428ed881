"""Fine-tune the bundled model in several ways with one budget, and write a small JSON file for each result.

    python -m benchmarks.memorization --work_dir runs/memorization --datasets avatars emoji --variants plain default

A result that is there already (``results/DATASET-DUPLICATES-VARIANT-STEPS-SEED.json``) is not made again, and an
interrupted fine-tune goes on from its newest checkpoint, so the command can be stopped and started at will.
`python -m benchmarks.memorization.table` makes the tables and the plot of the results.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple, get_args

import diffusers
import torch

from benchmarks.memorization.datasets import DATASETS, Dataset, Duplicates, load_dataset, training_folder
from benchmarks.memorization.judge import Exam, judge, prepare_exam
from benchmarks.memorization.variants import COMMON, VARIANTS
from sd_memguard.assets import tiny_sd_path
from sd_memguard.config import TrainConfig, make_train_config
from sd_memguard.console import configure_logging
from sd_memguard.proxies.state_file import load_state
from sd_memguard.runs.checkpoint import list_checkpoints
from sd_memguard.training.trainer import train

RESULTS = Path(__file__).parent / "results"
SECONDS = "cpu_seconds.json"
"""A file in a run's folder."""


class Case(NamedTuple):
    """One fine-tune: on which data, with which duplicates, how, and from which seed."""

    dataset: str
    duplicates: Duplicates
    variant: str
    seed: int

    def file(self, folder: Path, step: int) -> Path:
        """Return the file of a result."""
        return folder / f"{self.dataset}-{self.duplicates}-{self.variant}-{step}-{self.seed}.json"


def main() -> None:
    """Train and judge what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="where the runs go; may be removed afterwards")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=["avatars"], help="what is trained on")
    parser.add_argument("--duplicates", nargs="+", choices=get_args(Duplicates), default=["exact"])
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["base", "plain", "balance", "default", "paper"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one fine-tune of each variant per seed")
    parser.add_argument("--max_train_steps", type=int, default=900, help="optimizer steps of each fine-tune")
    parser.add_argument("--points", type=int, default=1, help="checkpoints along the training that are judged")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are")
    options = parser.parse_args()
    configure_logging()
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.datasets:
        dataset = load_dataset(name)
        exam = prepare_exam(dataset)
        for duplicates in options.duplicates:
            for seed in options.seeds:
                for variant in options.variants:
                    run_case(Case(name, duplicates, variant, seed), dataset, exam, options)


def run_case(case: Case, dataset: Dataset, exam: Exam, options: argparse.Namespace) -> None:
    """Train one variant and judge its checkpoints, as far as that has not been done."""
    folder = options.work_dir / "-".join(map(str, (*case, options.max_train_steps)))
    if case.variant == "base":
        file = options.results / f"{case.dataset}-any-base-0-0.json"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            generated = folder / "generated.safetensors"
            write_result(
                file, {"case": case._asdict(), "step": 0} | judge(exam, tiny_sd_path() / "unet", generated, "base")
            )
        return
    every = options.max_train_steps // options.points
    files = {step: case.file(options.results, step) for step in range(every, every * options.points + 1, every)}
    if all(file.exists() for file in files.values()):
        return
    data = training_folder(dataset, case.duplicates, options.work_dir / f"data-{case.dataset}-{case.duplicates}")
    config = configuration(case, data, folder, every, options.max_train_steps)
    if not (folder / "model_index.json").exists():
        train_timed(config)
    for checkpoint in list_checkpoints(folder):
        step = int(checkpoint.name.rpartition("-")[2])
        if step in files and not files[step].exists():
            description = f"{case.dataset}, {case.variant}, step {step}"
            judged = judge(exam, checkpoint / "unet", folder / f"generated-{step}.safetensors", description)
            write_result(files[step], describe(case, step, checkpoint, options) | judged)
    for checkpoint in list_checkpoints(folder):
        for part in (path for path in checkpoint.iterdir() if path.name != "unet"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()


def configuration(case: Case, data: Path, folder: Path, checkpointing_steps: int, steps: int) -> TrainConfig:
    """Return the settings of one fine-tune."""
    return make_train_config(
        **COMMON,
        **VARIANTS[case.variant].settings,
        train_data_dir=str(data),
        max_train_steps=steps,
        checkpointing_steps=checkpointing_steps,
        output_dir=str(folder),
        resume_from_checkpoint="latest",
        seed=case.seed,
    )


def train_timed(config: TrainConfig) -> None:
    """Train, and write down the processor seconds of the whole run; null where it went on from a checkpoint."""
    folder, start = Path(config.output_dir), time.process_time()
    fresh = not list_checkpoints(folder)
    train(config)
    (folder / SECONDS).write_text(json.dumps(round(time.process_time() - start) if fresh else None), encoding="utf-8")


def describe(case: Case, step: int, checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what made a result and what it cost."""
    progress = load_state(checkpoint / "memguard", "state")["ensemble"]["progress"]
    recorded = json.loads((checkpoint.parent / "memguard" / "config.json").read_text(encoding="utf-8"))
    weights = (checkpoint / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    return {
        "case": case._asdict(),
        "step": step,
        "settings": COMMON | VARIANTS[case.variant].settings,
        "resolved": {name: recorded[name] for name in ("num_shards", "sample_rule")},
        "command": f"python -m benchmarks.memorization --datasets {case.dataset} --duplicates {case.duplicates} "
        f"--variants {case.variant} --seeds {case.seed} --max_train_steps {options.max_train_steps} "
        f"--points {options.points} --work_dir runs/memorization",
        **origin(),
        "unet_sha256": hashlib.sha256(weights).hexdigest(),
        "extra_steps": sum(progress["extra_steps"]),
        "empty_steps": progress["empty_steps"],
        "image_forwards": progress["image_forwards"],
        "cpu_seconds_of_run": json.loads((checkpoint.parent / SECONDS).read_text(encoding="utf-8")),
    }


def origin() -> dict[str, Any]:
    """Return the commit and the versions that make a result."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return {"commit": head, "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}}


def write_result(file: Path, result: dict[str, Any]) -> None:
    """Write a result and print the essentials."""
    file.write_text(json.dumps(result, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    shares = {kind: one["own"].count("1") / len(one["own"]) for kind, one in result["replication"].items()}
    print(file.stem, shares, result["losses"]["heldout"]["mean"], result["quality"], flush=True)


if __name__ == "__main__":
    main()
