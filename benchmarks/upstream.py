"""The same fine-tune by one of diffusers' text-to-image scripts and by this project: how good, and how fast.

Three variants train a model on the bundled images with the same settings: upstream's script, this project
with the guard off ("plain") and with it on ("guarded"). They take turns, once per seed. Then the UNet of each run is
measured on the 256 held-out images, at the same timesteps with the same noise, and by code of this file's own.

    python -m benchmarks.upstream --upstream_script train_text_to_image.py --output_dir runs/upstream

The model is the bundled one; for `train_text_to_image_sdxl.py` and `train_text_to_image_lora_sdxl.py` an SDXL of that
size with the bundled VAE and random weights elsewhere. With the two scripts of LoRA, this project trains LoRA, too.

Further flags go to all variants, such as `--learning_rate=1e-3` and `--max_train_samples=256`.

Time is measured twice: the whole process from start to end, and the loop alone, between the tracker's entries of the
first and the last step (both write them in the same way). Images are those of the schedule: steps times batch size.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.denoising import Encoded, denoising_losses, encode
from benchmarks.tiny_pipelines import make
from benchmarks.upstream_cases import LORA
from sd_memguard.assets import demo_data_path, demo_heldout_path, tiny_sd_path
from sd_memguard.audit.images import load_images

BATCH_SIZE, RESOLUTION = 16, 64
STUDENT_T = {2: 4.30, 4: 2.78, 6: 2.45, 8: 2.31}
"""Two-sided 95 % quantile of Student's t by degrees of freedom."""
VARIANTS = ("upstream", "plain", "guarded")


class Run(NamedTuple):
    """One run: the mean loss on the held-out images, and images per second of the whole process and of the loop."""

    heldout_loss: float
    process_rate: float
    loop_rate: float


def make_model(upstream_script: Path, folder: Path) -> Path:
    """Return the folder of the model that the script trains; an SDXL is made there."""
    if "sdxl" not in upstream_script.stem:
        return tiny_sd_path()
    make("sdxl", folder)
    shutil.rmtree(folder / "vae")
    shutil.copytree(tiny_sd_path() / "vae", folder / "vae")
    return folder


def command(
    variant: str,
    upstream_script: Path,
    seed: int,
    steps: int,
    folder: Path,
    model: Path | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """Return the command of one run; every variant gets the same flags, the extra ones last, which win."""
    flags = {
        "pretrained_model_name_or_path": model or tiny_sd_path(),
        "train_data_dir": demo_data_path(),
        "resolution": RESOLUTION,
        "train_batch_size": BATCH_SIZE,
        "learning_rate": 3e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": steps,
        "checkpointing_steps": steps + 1,
        "report_to": "tensorboard",
        "cache_dir": folder.parent / "cache",
        "seed": seed,
        "output_dir": folder,
    }
    start = [str(upstream_script)] if variant == "upstream" else ["-m", "sd_memguard.train"]
    own = {"upstream": [], "plain": ["--memguard=off"], "guarded": ["--memguard=on"]}[variant]
    if variant != "upstream" and "lora" in upstream_script.stem:
        own = [*own, "--proxy=lora"]
    return [
        sys.executable,
        *start,
        *(f"--{name}={value}" for name, value in flags.items()),
        "--center_crop",
        *own,
        *extra,
    ]


def train(
    variant: str,
    upstream_script: Path,
    seed: int,
    steps: int,
    folder: Path,
    model: Path,
    heldout: Encoded,
    extra: Sequence[str] = (),
) -> Run:
    """Train one variant in a process of its own and measure the result."""
    start = time.monotonic()
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        run = command(variant, upstream_script, seed, steps, folder, model, extra)
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        subprocess.run(run, stdout=log, stderr=subprocess.STDOUT, env=offline, check=True)
    seconds = time.monotonic() - start
    return Run(heldout_loss(folder, heldout, model), steps * BATCH_SIZE / seconds, loop_rate(folder))


def loop_rate(folder: Path) -> float:
    """Return the images per second between the tracker's entries of the first and the last step."""
    logs = [_scalars(path) for path in folder.rglob("events.out.tfevents.*")]
    (log,) = (log for log in logs if "train_loss" in log.Tags()["scalars"])
    steps = log.Scalars("train_loss")
    return (len(steps) - 1) * BATCH_SIZE / (steps[-1].wall_time - steps[0].wall_time)


def _scalars(file: Path) -> EventAccumulator:
    events = EventAccumulator(str(file), size_guidance={"scalars": 0})
    events.Reload()
    return events


def load_heldout(model: Path) -> Encoded:
    """Encode the held-out images."""
    images = load_images(demo_heldout_path(), RESOLUTION)
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    return encode(images.pixels, images.captions, pipeline)


def heldout_loss(folder: Path, heldout: Encoded, model: Path) -> float:
    """Return the mean squared error of a UNet's noise over all held-out images at fixed timesteps and noise.

    Args:
        folder: of a run: with a UNet, or with a LoRA alone.
        heldout: the images.
        model: that was trained, on which a LoRA is put.
    """
    if (folder / "unet").is_dir():
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    else:
        pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
        pipeline.load_lora_weights(folder, weight_name=LORA)
        unet = pipeline.unet
    return float(denoising_losses(unet, heldout).mean())


def compare(runs: dict[str, list[Run]], before: float) -> str:
    """Return the tables: what each variant reached, and each of ours against upstream."""
    lines = [
        "| variant | held-out loss, mean ± sd of the seeds | images/s, process | images/s, loop |",
        "|---|---|---|---|",
    ]
    lines.append(f"| (before) | {before:.5f} | | |")
    for variant, row in runs.items():
        losses = [run.heldout_loss for run in row]
        rates = " | ".join(f"{statistics.median(rate):.1f}" for rate in list(zip(*row, strict=True))[1:])
        lines.append(f"| {variant} | {statistics.mean(losses):.5f} ± {statistics.stdev(losses):.5f} | {rates} |")
    lines += [
        "",
        "| against upstream | loss, difference | its 95 % interval | rate, process | rate, loop |",
        "|---|---|---|---|---|",
    ]
    for variant in VARIANTS[1:]:
        difference, noise = loss_difference(runs[variant], runs["upstream"])
        pairs = list(zip(runs[variant], runs["upstream"], strict=True))
        process = statistics.median(ours.process_rate / theirs.process_rate for ours, theirs in pairs)
        loop = statistics.median(ours.loop_rate / theirs.loop_rate for ours, theirs in pairs)
        lines.append(f"| {variant} | {difference:+.5f} | ±{noise:.5f} | {process:.2f} | {loop:.2f} |")
    return "\n".join([*lines, "", "Rates are medians over the seeds, ratios medians of the ratios within a seed."])


def loss_difference(ours: list[Run], theirs: list[Run]) -> tuple[float, float]:
    """Return the difference of the mean losses and the half-width of its 95 % interval."""
    samples = [[run.heldout_loss for run in row] for row in (ours, theirs)]
    error = math.sqrt(sum(statistics.variance(sample) for sample in samples) / len(ours))
    quantile = STUDENT_T.get(2 * len(ours) - 2, 2.31)
    return statistics.mean(samples[0]) - statistics.mean(samples[1]), quantile * error


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream_script", type=Path, required=True, help="a copy of diffusers' script")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder: the runs, and upstream.json")
    parser.add_argument("--max_train_steps", type=int, default=150, help="optimizer steps of each run")
    parser.add_argument(
        "--model", type=Path, help="folder of the model to train, in place of the bundled or random one"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant, 2 or more")
    settings, extra = parser.parse_known_args()
    settings.output_dir.mkdir(parents=True)
    model = settings.model or make_model(settings.upstream_script, settings.output_dir.absolute() / "model")
    heldout = load_heldout(model)
    before = heldout_loss(model, heldout, model)
    runs: dict[str, list[Run]] = {variant: [] for variant in VARIANTS}
    for seed in range(settings.seeds):
        for variant in VARIANTS:
            folder = settings.output_dir.absolute() / f"{variant}-{seed}"
            run = train(
                variant,
                settings.upstream_script,
                seed,
                settings.max_train_steps,
                folder,
                model,
                heldout,
                extra,
            )
            runs[variant].append(run)
            print(variant, seed, runs[variant][-1], flush=True)
            record = {name: [run._asdict() for run in row] for name, row in runs.items()}
            (settings.output_dir / "upstream.json").write_text(
                json.dumps({"before": before, **record}, indent=1) + "\n"
            )
    print(compare(runs, before))


if __name__ == "__main__":
    main()
