"""Two processes on a core each against one on one core: time of a step, what is sent, and whether it is the same.

Three ways to train the bundled model on the bundled images with the same seed and the same steps:

- `one`: one process;
- `shards`: two processes, each with two of the four shards;
- `batch`: two processes, each with half of every batch of one shard after the other (plain training, one proxy).

`one` is run both ways (four shards, and plain). All runs take turns, so that whatever else the machine does meets them
alike. Each process is pinned to a core of its own and trains on one thread.

    python -m benchmarks.processes --output_dir runs/processes

Steps are timed within the training loop, by the clock and by the processor time of the process: on a shared machine the
clock also counts what others take. Bytes are counted where they are handed to torch.distributed; the gradients that DDP
exchanges alone are computed from their size. Linux only.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARDS, STEPS_PER_ROUND, NUM_ROUNDS, BATCH_SIZE = 4, 4, 2, 16
SETTINGS = {
    "one shards": (1, "on", BATCH_SIZE),
    "two shards": (2, "on", BATCH_SIZE),
    "one batch": (1, "off", BATCH_SIZE),
    "two batch": (2, "off", BATCH_SIZE // 2),
}
"""Processes, guard, and samples per process and step of each variant."""
SD15_WEIGHTS = 859_520_964
"""Parameters of Stable Diffusion 1.5's UNet."""


def settings_of(variant: str, folder: Path) -> dict[str, Any]:
    """Return the settings of a run."""
    _, memguard, batch_size = SETTINGS[variant]
    guard = {"num_shards": SHARDS, "steps_per_round": STEPS_PER_ROUND} if memguard == "on" else {}
    steps = SHARDS * STEPS_PER_ROUND * NUM_ROUNDS
    return {
        "pretrained_model_name_or_path": "bundled",
        "train_data_dir": "bundled",
        "max_train_samples": 128,
        "output_dir": str(folder),
        "memguard": memguard,
        "resolution": 64,
        "center_crop": True,
        "train_batch_size": batch_size,
        "max_train_steps": steps if memguard == "on" else steps // 2,
        "checkpointing_steps": 10**6,
        "learning_rate": 1e-4,
        "adam_epsilon": 1e-4,
        "seed": 0,
        "proxy_store": "ram",
        **guard,
    }


# In a process that trains.


def work(settings: dict[str, Any], rank: int, result: Path) -> None:
    """Train, and write how long steps, round ends and waits took, and what was sent."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    import torch

    torch.set_num_threads(1)
    from sd_memguard.config import make_train_config
    from sd_memguard.proxies.full import FullProxies
    from sd_memguard.training import trainer as loop
    from sd_memguard.training.sync import RankSync

    times: dict[str, list[tuple[float, float]]] = {"step": [], "augmented_step": [], "round_end": [], "wait": []}
    times |= {"fit": [], "average": []}
    trainers: list[loop.Trainer] = []

    def timed(owner: Any, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def measured(self: Any, *args: Any, **options: Any) -> Any:
            if isinstance(self, loop.Trainer):
                trainers[:] = [self]
            clock, processor = time.perf_counter(), time.process_time()
            value = original(self, *args, **options)
            times[kind].append((time.perf_counter() - clock, time.process_time() - processor))
            return value

        setattr(owner, name, measured)

    timed(loop.Trainer, "step", "step")
    timed(loop.Trainer, "augmented_step", "augmented_step")
    timed(loop.Trainer, "end_round", "round_end")
    timed(loop.Trainer, "fit", "fit")
    timed(FullProxies, "average", "average")
    timed(RankSync, "meet", "wait")
    loop.train(make_train_config(**settings))
    (trainer,) = trainers
    num_weights = sum(parameter.numel() for parameter in trainer.parameters)
    result.write_text(json.dumps({"times": times, "sent": trainer.ranks.exchange.sent, "num_weights": num_weights}))


# In the process that compares.


def run(variant: str, folder: Path) -> list[dict[str, Any]]:
    """Train one variant and return what each of its processes has measured."""
    size, *_ = SETTINGS[variant]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder.parent.mkdir(parents=True, exist_ok=True)
    files = [folder.parent / f"{folder.name}-{rank}.json" for rank in range(size)]
    started = []
    for rank, file in enumerate(files):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        if size > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            environment |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "localhost"}
        command = [sys.executable, "-m", "benchmarks.processes", "--output_dir", str(folder), "--worker", variant]
        with (folder.parent / f"{folder.name}-{rank}.log").open("w") as log:
            command += ["--rank", str(rank), "--result", str(file)]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    for process in started:
        if process.wait() != 0:
            raise SystemExit(f"{variant} failed, see {folder}-*.log")
    return [json.loads(file.read_text()) for file in files]


def difference(first: Path, second: Path) -> float:
    """Return the largest difference between the weights of two runs."""
    from safetensors.torch import load_file

    file = "unet/diffusion_pytorch_model.safetensors"
    left, right = load_file(first / file), load_file(second / file)
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def median(processes: list[dict[str, Any]], kind: str, which: int) -> float:
    """Return the median time in ms over all processes: by the clock (0) or the processor (1)."""
    return 1000 * statistics.median(pair[which] for process in processes for pair in process["times"][kind])


def total(process: dict[str, Any], kind: str, which: int) -> float:
    """Return the seconds of all calls of a kind."""
    return sum(pair[which] for pair in process["times"][kind])


def rows_of(variant: str, turns: list[list[dict[str, Any]]]) -> str:
    """Return a variant's row of the table: medians over turns and processes."""
    together = [process for turn in turns for process in turn]
    fits = [max(total(process, "fit", 0) for process in turn) for turn in turns]
    processor = [max(total(process, "fit", 1) for process in turn) for turn in turns]
    waits = [total(process, "wait", 0) / total(process, "fit", 0) for process in together]
    numbers = [
        f"{median(together, 'step', 0):.0f}",
        f"{median(together, 'step', 1):.0f}",
        f"{statistics.median(fits):.1f}",
        f"{statistics.median(processor):.1f}",
        f"{statistics.median(waits):.1%}" if "two shards" in variant else "",
    ]
    return f"| {variant} | {' | '.join(numbers)} |"


def report(results: dict[str, list[list[dict[str, Any]]]], differences: dict[str, float]) -> str:
    """Return the tables."""
    lines = [
        "| variant | step, ms by the clock | step, ms of the processor | whole loop, s by the clock | of the processor "
        "(the slower process) | share of the loop spent waiting and merging at rank_sync |",
        "|---|---|---|---|---|---|",
        *(rows_of(variant, turns) for variant, turns in results.items()),
        "",
    ]
    num_weights = results["two shards"][0][0]["num_weights"]
    sent = results["two shards"][0][0]["sent"]
    batch = results["two batch"][0][0]
    steps = len(batch["times"]["step"])
    means = sent["mean of weights"] / (NUM_ROUNDS + 1) / 1e6
    others = {name: sent[name] for name in ("rank_sync", "progress", "ledger", "banks", "queues", "distances")}
    lines += [
        f"{num_weights:,} weights. Handed over by each process, of two:",
        f"- shards, within a round: 0 bytes per step; per round {means:.1f} MB of means (float64, "
        f"8 bytes a weight; one more for the model at the end) and {sum(others.values()) / NUM_ROUNDS / 1e3:.1f} kB of "
        "counts, banks, queues and progress",
        f"- batch: {batch['sent']['batch'] / steps:.0f} bytes per step of losses, timesteps and ids, and "
        f"{4 * num_weights / 1e6:.1f} MB of gradients (computed: 4 bytes a weight)",
        f"- largest difference of a weight from that of one process: shards {differences['shards']:.1e}, batch "
        f"{differences['batch']:.1e}",
        "",
    ]
    return "\n".join([*lines, *outlook(results, num_weights)])


def outlook(results: dict[str, list[list[dict[str, Any]]]], num_weights: int) -> list[str]:
    """Return what the measured times mean for eight processes with SD 1.5's UNet."""
    seconds = [pair[1] for turn in results["two shards"] for process in turn for pair in process["times"]["average"]]
    per_weight = statistics.median(seconds) / num_weights / (SHARDS // 2)
    sd15 = per_weight * SD15_WEIGHTS
    ring = 2 * 7 / 8 * 8 * SD15_WEIGHTS / 1e9
    lines = [
        f"An averaging took {1e9 * per_weight:.1f} ns of the processor per weight and shard of a process: for SD 1.5's "
        f"UNet with one shard in each of 8 processes {sd15:.0f} s; a ring passes {ring:.0f} GB through each process.",
    ]
    for step in (0.5, 1.0):
        share = sd15 / (sd15 + 1000 * step)
        lines.append(
            f"In rounds of 1000 steps of {step} s that is {share:.1%} of the time: {8 * (1 - share):.2f} times the "
            "steps of one process, before network and stragglers."
        )
    return lines


def main() -> None:
    """Run all variants in turns and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=2, help="runs of each variant")
    parser.add_argument("--worker", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(settings_of(args.worker, args.output_dir), args.rank, args.result)
        return
    results: dict[str, list[list[dict[str, Any]]]] = {variant: [] for variant in SETTINGS}
    folder = args.output_dir.absolute()
    for turn in range(args.turns):
        for variant, rows in results.items():
            start = time.monotonic()
            rows.append(run(variant, folder / f"{variant.replace(' ', '-')}-{turn}"))
            print(
                f"turn {turn + 1}, {variant}: {time.monotonic() - start:.0f} s, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    differences = {kind: difference(folder / f"one-{kind}-0", folder / f"two-{kind}-0") for kind in ("shards", "batch")}
    text = report(results, differences)
    (folder / "processes.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
