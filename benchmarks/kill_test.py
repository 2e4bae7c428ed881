"""A run that is killed again and again, saves included, ends with the very bytes of one that was left alone.

    python -m benchmarks.kill_test --work_dir runs/kill_test --kills 30

Each mode trains the bundled model once undisturbed. The second time the process is killed (SIGKILL) after a random part
of the time that the first one took, and started again with `--resume_from_checkpoint latest`, until it has been killed
often enough and may finish. A checkpoint is saved at every step, so that many kills fall into a save.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from sd_memguard.config import TrainConfig, make_train_config
from sd_memguard.training.trainer import train

RESULTS = ("unet/diffusion_pytorch_model.safetensors", "memguard/rounds.jsonl", "memguard/samples.parquet")
MODES: dict[str, dict[str, Any]] = {
    "full": {"use_ema": True},
    "disk": {"proxy_store": "disk", "checkpoints_total_limit": 1},
    "lora": {"proxy": "lora", "rank": 4},
    "plain": {"memguard": "off"},
    "processes": {"num_shards": 4, "proxy_store": "disk"},
}
NUM_PROCESSES = {"processes": 2}
"""Of the modes that have more than one, side by side on the shards; all of them are killed."""
SETTINGS: dict[str, Any] = {
    "pretrained_model_name_or_path": "bundled",
    "train_data_dir": "bundled",
    "max_train_samples": 96,
    "resolution": 64,
    "center_crop": True,
    "train_batch_size": 4,
    "num_shards": 3,
    "steps_per_round": 4,
    "max_train_steps": 36,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 2,
    "bank_mode": "paper",
    "seed": 0,
}


def forked(action: Callable[[], Any]) -> int:
    """Run something in a copy of this process and return its number; the copy ends with 0, or 1 after an error."""
    process = os.fork()
    if process:
        return process
    try:
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def start(config: TrainConfig, size: int) -> list[int]:
    """Start the processes of a run and return their numbers."""
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        port = finder.getsockname()[1]
    return [forked(partial(train_as, rank, size, port, config)) for rank in range(size)]


def train_as(rank: int, size: int, port: int, config: TrainConfig) -> None:
    """Train as one of the processes of a run, as a launcher would have it."""
    if size > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {name: str(number) for name, number in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
        AcceleratorState._reset_state(reset_partial_state=True)  # of the process this one is a copy of
    train(config)


def wait_for(processes: list[int]) -> list[int]:
    """Wait until all have ended and return how: 0, 1, or minus the number of a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def finish(processes: list[int]) -> None:
    """Wait for a run that must end well."""
    if any(ends := wait_for(processes)):
        raise RuntimeError(f"the run ended with {ends}")


def survive(
    settings: dict[str, Any], folder: Path, num_kills: int, chance: random.Random, size: int = 1
) -> dict[str, Any]:
    """Train undisturbed into ``whole`` and with kills into ``killed``, and return what happened to the second one."""
    began = time.monotonic()
    finish(start(make_train_config(**settings, output_dir=str(folder / "whole")), size))
    seconds = time.monotonic() - began
    resumed = make_train_config(**settings, output_dir=str(folder / "killed"), resume_from_checkpoint="latest")
    kills = in_save = early = 0
    span = seconds
    while kills < num_kills and early < 10 + num_kills:
        processes = start(resumed, size)
        time.sleep(chance.uniform(0.1, 0.9) * span)
        for process in processes:
            os.kill(process, signal.SIGKILL)
        if -signal.SIGKILL in wait_for(processes):
            kills += 1
            in_save += any((folder / "killed").glob("writing-*"))
        else:  # it had finished: begin again and kill sooner, so that every kill hits a run at work
            early += 1
            span *= 0.7
            shutil.rmtree(folder / "killed")
    finish(start(resumed, size))
    same = {name: (folder / "whole" / name).read_bytes() == (folder / "killed" / name).read_bytes() for name in RESULTS}
    return {"kills": kills, "in_save": in_save, "restarted": early, "seconds": round(seconds, 1), "identical": same}


def main() -> None:
    """Run every mode and say whether the bytes are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=30, help="kills of each mode")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked copy must not inherit a pool of threads
    options.work_dir.mkdir(parents=True)
    outcomes = {}
    for mode in options.modes:
        settings, size = SETTINGS | MODES[mode], NUM_PROCESSES.get(mode, 1)
        outcomes[mode] = survive(settings, options.work_dir / mode, options.kills, random.Random(options.seed), size)
        print(mode, outcomes[mode], flush=True)
    if not all(all(outcome["identical"].values()) for outcome in outcomes.values()):
        raise SystemExit("a killed run ended with other bytes")


if __name__ == "__main__":
    main()
