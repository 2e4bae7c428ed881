"""Peak memory of training Stable Diffusion 1.5's UNet under the guard, with one shard and with two.

All UNet weights are trained in float32, on the CPU, where weights, gradients and optimizer state show up as anonymous
memory of the process. The UNet has the shapes of SD 1.5 and random weights; the VAE and the text encoder beside it are
small ones that fit. Each run is a process of its own and takes two optimizer steps in one round: both on the one shard,
or one on each of two, whose proxies rest on the disk and are averaged at the end.

    python -m benchmarks.memory_sd15 --output_dir runs/memory_sd15

It needs about 16 GB of free memory and 40 GB of disk; `--base_channels 32` makes a small UNet for a trial. Linux only.
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

SHARDS = (1, 2)
STEPS = 2
TARGET = 1.10
"""Most that two shards may take, relative to one."""


class Run(NamedTuple):
    """One training run: peak of the anonymous memory and size of the UNet in bytes, and wall-clock seconds."""

    peak_bytes: int
    unet_bytes: int
    seconds: float


class PeakMemory(threading.Thread):
    """Samples this process's anonymous resident memory every 5 ms and keeps the highest value, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, 1024 * kibibytes)
            time.sleep(0.005)


def make_pipeline(folder: Path, base_channels: int) -> None:
    """Write a pipeline whose UNet is that of SD 1.5 (``base_channels`` 320), with random weights."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from sd_memguard import assets

    torch.manual_seed(0)
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        down_block_types=(down, down, down, "DownBlock2D"),
        up_block_types=("UpBlock2D", up, up, up),
        block_out_channels=tuple(factor * base_channels for factor in (1, 2, 4, 4)),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        latent_channels=4,
    )
    text = CLIPTextConfig(hidden_size=768, intermediate_size=768, num_hidden_layers=1, num_attention_heads=12)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(assets.tiny_sd_path(), subfolder="tokenizer"),
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, max_shard_size="100GB")


def train_once(pipeline: Path, folder: Path, num_shards: int, resolution: int) -> Run:
    """Train in this process and return what it took."""
    memory, start = PeakMemory(), time.monotonic()
    from sd_memguard.config import make_train_config
    from sd_memguard.training.loop import train

    result = train(
        make_train_config(
            pretrained_model_name_or_path=str(pipeline),
            train_data_dir="bundled",
            max_train_samples=8,
            resolution=resolution,
            center_crop=True,
            output_dir=str(folder),
            train_batch_size=1,
            max_train_steps=STEPS,
            num_shards=num_shards,
            steps_per_round=STEPS,
            proxy_store="disk",
            checkpointing_steps=1000,
            seed=0,
        )
    )
    if result.global_step != STEPS or result.summary["empty_steps"]:
        raise RuntimeError(f"the run did not take its {STEPS} steps: {result.summary}")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return Run(memory.peak, unet.stat().st_size, round(time.monotonic() - start, 1))


def in_own_process(function: Any, *arguments: Any) -> Any:
    """Return what a function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def report(runs: dict[int, Run]) -> str:
    """Return the figures as a table of Markdown."""
    lines = ["| shards | peak anonymous memory | in UNets of float32 | seconds |", "|---|---|---|---|"]
    for num_shards, run in runs.items():
        in_unets = run.peak_bytes / run.unet_bytes
        lines.append(f"| {num_shards} | {run.peak_bytes / 1e9:.2f} GB | {in_unets:.2f} | {run.seconds:.0f} |")
    ratio = runs[2].peak_bytes / runs[1].peak_bytes
    return "\n".join([*lines, "", f"two shards / one: {ratio:.3f} (at most {TARGET:.2f} wanted)"])


def main() -> None:
    """Run the benchmark; exit with status 1 where two shards take more than they may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of memory_sd15.json")
    parser.add_argument("--work_dir", type=Path, help="folder of the temporary files (default: the system's)")
    parser.add_argument("--base_channels", type=int, default=320, help="channels of the UNet's first level")
    parser.add_argument("--resolution", type=int, default=64, help="side of the pictures in pixels")
    settings = parser.parse_args()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="memory-sd15-", dir=settings.work_dir))
    runs: dict[int, Run] = {}
    try:
        in_own_process(make_pipeline, work / "pipeline", settings.base_channels)
        for num_shards in SHARDS:
            folder = work / "run"
            runs[num_shards] = in_own_process(train_once, work / "pipeline", folder, num_shards, settings.resolution)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(work)
    ratio = runs[2].peak_bytes / runs[1].peak_bytes
    record = {
        "base_channels": settings.base_channels,
        "resolution": settings.resolution,
        "runs": {num_shards: run._asdict() for num_shards, run in runs.items()},
        "ratio": ratio,
    }
    (settings.output_dir / "memory_sd15.json").write_text(json.dumps(record, indent=1) + "\n")
    print(report(runs))
    raise SystemExit(ratio > TARGET)


if __name__ == "__main__":
    main()
