"""The step of this project beside the bare loop: UNet forward, backward, clipping and AdamW on ready latents.

The variants train copies of one UNet from the same weights in one process and take turns, a few steps each (A B C A B
C):

- bare: what no loop can do without, on latents and embeddings that lie ready on the device;
- plain: `Trainer.step` with the guard off, caches on;
- guarded: the same with the guard on;
- compiled, with `--compile`: the same with the UNet compiled.

    python -m benchmarks.step --output_dir runs/step                            # the bundled model
    python -m benchmarks.step --size mid --output_dir runs/step-mid             # 142 million parameters
    python -m benchmarks.step --size sd15 --device cuda --mixed_precision bf16 --output_dir runs/step-sd15

Extra steps on augmented copies are not in it: they are more training, not more work for the same. In the guarded
variant thresholds are as in training; a step without a clean sample would be cheaper than a bare one, and is counted.
The guard's own share is measured apart: `weigh` and the counting, on losses of the run. `--profile` adds a table of
torch.profiler over guarded steps. On the CPU, time is that of the processor in this process, on which other work on the
machine has less of a hold than on the clock; on CUDA it is the clock.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory_sd15 import make_pipeline
from sd_memguard.assets import demo_data_path, tiny_sd_path
from sd_memguard.config import make_train_config
from sd_memguard.data.batches import Batch
from sd_memguard.training.build import make_accelerator
from sd_memguard.training.plan import make_plan
from sd_memguard.training.trainer import Trainer

SIZES = {"bundled": (64, 16), "mid": (128, 2), "sd15": (512, 4)}
"""Resolution and batch size of each model."""
BASE_CHANNELS = {"mid": 128, "sd15": 320}
VARIANTS = ("bare", "plain", "guarded", "compiled")


def make_trainer(variant: str, pipeline: Path, folder: Path, settings: argparse.Namespace) -> Trainer:
    """Return a trainer that is ready for its first step."""
    resolution, batch_size = SIZES[settings.size]
    config = make_train_config(
        pretrained_model_name_or_path=str(pipeline),
        train_data_dir=str(demo_data_path()),
        output_dir=str(folder / variant),
        resolution=settings.resolution or resolution,
        train_batch_size=settings.train_batch_size or batch_size,
        max_train_samples=64,
        center_crop=True,
        max_train_steps=100_000,
        num_shards=1,
        steps_per_round=1000,
        learning_rate=1e-6,
        mixed_precision=settings.mixed_precision,
        memguard="on" if variant in {"guarded", "compiled"} else "off",
        cache_latents="memory",
        cache_text_embeddings="memory",
        compile=variant == "compiled",
        seed=0,
    )
    plan = make_plan(config)
    return Trainer(plan, make_accelerator(plan.config))


def stepper(trainer: Trainer) -> Callable[[], None]:
    """Return a function that takes one step of the trainer."""
    size, members = trainer.config.train_batch_size, trainer.guard.plan.members(0)
    refs = trainer.progress.samplers[0].peek(members, 2000 * size, 0)
    batches = trainer.source.batches([refs[start : start + size] for start in range(0, len(refs), size)])

    def step() -> None:
        trainer.step(batches, [size])
        while trainer.guard.take_augment_batch(size) is not None:
            pass  # an extra step, which is not measured
        trainer.progress.global_step += 1

    return step


def bare_stepper(trainer: Trainer) -> Callable[[], None]:
    """Return a function that takes one step of the bare loop on batches that are ready on the device."""
    device, size = trainer.accelerator.device, trainer.config.train_batch_size
    refs = trainer.progress.samplers[0].peek(trainer.guard.plan.members(0), 8 * size, 0)
    chunks = [refs[start : start + size] for start in range(0, len(refs), size)]
    ready: list[tuple[Batch, Tensor, Tensor]] = []
    for _, batch in trainer.source.batches(chunks):
        noise = torch.randn_like(batch.latents)
        ready.append((batch, noise, torch.randint(1000, (len(noise),), device=device)))
    cycle = _cycle(ready)
    scheduler, parameters = trainer.loss.noise_scheduler, trainer.parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=1e-2, fused=True)

    def step() -> None:
        (latents, condition, _), noise, timesteps = next(cycle)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = trainer.model(noisy, timesteps, condition.embeddings, return_dict=False)[0]
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _cycle(items: list[Any]) -> Iterator[Any]:
    while True:
        yield from items


def seconds_of(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Return the seconds per step over a few steps, with the device at rest before and after."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    _synchronize(device)
    start = clock()
    for _ in range(steps):
        step()
    _synchronize(device)
    return (clock() - start) / steps


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def guard_seconds(trainer: Trainer, repeats: int = 100) -> float:
    """Return the seconds that the guard takes for one batch: bank, bands, the copy to the host, ledger and queue."""
    device, size = trainer.accelerator.device, trainer.config.train_batch_size
    guard = trainer.guard
    losses = torch.rand(size, device=device, requires_grad=True)
    timesteps = torch.randint(1000, (size,), device=device)
    sample_ids = guard.plan.members(0)[:size]

    def weigh() -> None:
        verdict = guard.weigh(losses, timesteps, sample_ids, wait=False)
        _ = verdict.num_clean
        guard.take_augment_batch(size)

    return statistics.median(seconds_of(weigh, 10, device) for _ in range(repeats // 10))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of step.json")
    parser.add_argument("--size", choices=SIZES, default="bundled")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--resolution", type=int, help="side of the images in pixels, of the size if not given")
    parser.add_argument("--train_batch_size", type=int, help="of the size if not given")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--compile", action="store_true", help="add one with a compiled UNet, which takes minutes")
    parser.add_argument("--steps", type=int, default=2, help="steps of a variant in its turn")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print where the time of guarded steps goes")
    settings = parser.parse_args()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here")
    with tempfile.TemporaryDirectory() as folder:
        pipeline = tiny_sd_path()
        if settings.size in BASE_CHANNELS:
            pipeline = Path(folder) / "pipeline"
            make_pipeline(pipeline, BASE_CHANNELS[settings.size], real=settings.size == "sd15")
        variants = VARIANTS if settings.compile else VARIANTS[:-1]
        trainers = {variant: make_trainer(variant, pipeline, Path(folder), settings) for variant in variants}
        device = trainers["bare"].accelerator.device
        steps = {name: (bare_stepper if name == "bare" else stepper)(trainer) for name, trainer in trainers.items()}
        for step in steps.values():
            seconds_of(step, 2, device)  # allocations, and what is compiled
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(settings.turns):
            for variant, step in steps.items():
                times[variant].append(seconds_of(step, settings.steps, device))
        guarded = trainers["guarded"]
        record = {
            "size": settings.size,
            "parameters": sum(p.numel() for p in UNet2DConditionModel.parameters(guarded.unet)),
            "device": str(device),
            "batch_size": guarded.config.train_batch_size,
            "resolution": guarded.config.resolution,
            "seconds": {variant: statistics.median(values) for variant, values in times.items()},
            "ratios": {variant: ratios(times[variant], times["bare"]) for variant in variants},
            "guard_share": guard_seconds(guarded) / statistics.median(times["guarded"]),
            "empty_steps": guarded.progress.empty_steps,
        }
        (settings.output_dir / "step.json").write_text(json.dumps(record, indent=1) + "\n")
        print(report(record))
        if settings.profile:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            with profile(activities=activities) as profiler:
                seconds_of(steps["guarded"], 5, device)
            key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
            print(profiler.key_averages().table(sort_by=key, row_limit=20))


def ratios(times: list[float], against: list[float]) -> list[float]:
    """Return the quartiles of the ratios within the turns."""
    return statistics.quantiles([a / b for a, b in zip(times, against, strict=True)], n=4)


def report(record: dict[str, Any]) -> str:
    """Return the figures as a table of Markdown."""
    what = f"{record['parameters'] / 1e6:.1f} M parameters, {record['resolution']} px, batch {record['batch_size']}"
    lines = [f"{what}, on {record['device']}", "", "| variant | seconds per step | against bare, median (quartiles) |"]
    lines.append("|---|---|---|")
    for variant, (low, middle, high) in record["ratios"].items():
        lines.append(f"| {variant} | {record['seconds'][variant]:.4f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
    lines += ["", f"the guard's own work: {record['guard_share']:.2%} of a guarded step"]
    lines.append(f"guarded steps without a clean sample, which take no optimizer step: {record['empty_steps']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
