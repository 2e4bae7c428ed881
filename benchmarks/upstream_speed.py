r"""Images per second in the loops of diffusers' `train_text_to_image.py` and of this project.

Every variant trains the same model on the bundled images with the same settings, once with few steps and once with
more; the difference of the two is the loop alone, without start-up, caches and export. The variants take turns. On the
CPU what counts is the processor time of the process, in one thread, which other work on the machine hardly changes;
with `--clock wall`, for a GPU, it is the clock.

    python -m benchmarks.upstream_speed --upstream_script train_text_to_image.py --output_dir runs/upstream_speed
    python -m benchmarks.upstream_speed --upstream_script train_text_to_image.py --size sd15 --clock wall \
        --mixed_precision bf16 --train_batch_size 4 --output_dir runs/upstream_speed-sd15

Images are those of the schedule: steps times batch size. The guarded variant's extra steps on augmented copies are more
training than was asked for; its rate is given with and without the images of those.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.memory_sd15 import make_pipeline
from benchmarks.upstream import command
from sd_memguard.assets import tiny_sd_path

VARIANTS = ("upstream", "plain", "uncached", "guarded")
KEPT = ["--cache_latents=memory", "--cache_text_embeddings=memory"]
"""Automatically, runs this short would cache nothing."""
FLAGS = {
    "plain": KEPT,
    "uncached": ["--cache_latents=off", "--cache_text_embeddings=off"],
    "guarded": ["--num_shards=1", *KEPT],
}


class Run(NamedTuple):
    """Seconds of a process, and its extra steps."""

    seconds: float
    extra_steps: int


def train(variant: str, settings: argparse.Namespace, pipeline: Path, seed: int, steps: int, folder: Path) -> Run:
    """Train one variant in a process of its own."""
    kind = {"uncached": "plain"}.get(variant, variant)
    common = [
        f"--pretrained_model_name_or_path={pipeline}",
        f"--resolution={512 if settings.size == 'sd15' else 64}",
        f"--train_batch_size={settings.train_batch_size}",
        f"--mixed_precision={settings.mixed_precision}",
    ]
    # The last value of a flag counts.
    arguments = [*command(kind, settings.upstream_script, seed, steps, folder), *common, *FLAGS.get(variant, [])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if settings.clock == "processor":
        environment["OMP_NUM_THREADS"] = "1"
    log, start = folder.parent / f"{folder.name}.log", time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{variant} ended with {process.returncode}, see {log}")
    seconds = usage.ru_utime + usage.ru_stime if settings.clock == "processor" else time.perf_counter() - start
    extra = re.search(r"(\d+) extra steps", log.read_text())
    return Run(seconds, int(extra[1]) if extra else 0)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream_script", type=Path, required=True, help="a copy of diffusers' script")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder: the runs, and upstream_speed.json")
    parser.add_argument("--steps", type=int, nargs=2, default=[20, 100], help="optimizer steps, few and more")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--size", choices=["bundled", "sd15"], default="bundled", help="sd15: SD 1.5's shapes at 512 px"
    )
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--clock", choices=["processor", "wall"], default="processor")
    settings = parser.parse_args()
    settings.output_dir.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = tiny_sd_path()
        if settings.size == "sd15":
            pipeline = Path(folder) / "pipeline"
            make_pipeline(pipeline, 320, real=True)
        compare(settings, pipeline)


def compare(settings: argparse.Namespace, pipeline: Path) -> None:
    """Run the variants in turns and print the tables."""
    few, more = settings.steps
    rates: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    starts: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with_extra: list[float] = []
    for turn in range(settings.turns):
        for variant in VARIANTS:
            folder = settings.output_dir.absolute()
            short, long = (
                train(variant, settings, pipeline, turn, steps, folder / f"{variant}-{turn}-{steps}")
                for steps in (few, more)
            )
            seconds, images = long.seconds - short.seconds, (more - few) * settings.train_batch_size
            rates[variant].append(images / seconds)
            starts[variant].append(short.seconds - few * seconds / (more - few))
            if variant == "guarded":
                extra = (long.extra_steps - short.extra_steps) * settings.train_batch_size
                with_extra.append((images + extra) / seconds)
            rate, start = rates[variant][-1], starts[variant][-1]
            print(f"{variant}: {rate:.1f} images per second, {start:.0f} s around it", flush=True)
            record = {"rates": rates, "seconds_around": starts, "guarded_with_extra": with_extra}
            (settings.output_dir / "upstream_speed.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"Seconds by the {settings.clock}\n")
    wholes = {
        variant: [
            start + more * settings.train_batch_size / rate
            for start, rate in zip(starts[variant], rates[variant], strict=True)
        ]
        for variant in VARIANTS
    }
    print(f"| variant | images per second, loop | against upstream | seconds around the loop | all of {more} steps |")
    print("|---|---|---|---|---|")
    for variant in VARIANTS:
        rate, start = statistics.median(rates[variant]), statistics.median(starts[variant])
        faster, whole = (
            statistics.median(first / second for first, second in zip(*pair, strict=True))
            for pair in ((rates[variant], rates["upstream"]), (wholes["upstream"], wholes[variant]))
        )
        print(f"| {variant} | {rate:.1f} | {faster:.2f} | {start:.0f} | {whole:.2f} |")
    print(f"guarded, with the images of its extra steps: {statistics.median(with_extra):.1f}")


if __name__ == "__main__":
    main()
