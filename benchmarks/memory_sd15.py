r"""Peak memory of training Stable Diffusion 1.5's UNet under the guard, with one shard and with several.

All UNet weights are trained in float32, on the CPU, where weights, gradients and optimizer state show up as anonymous
memory of the process. The UNet has the shapes of SD 1.5 and random weights; the VAE and the text encoder beside it are
small ones that fit. Each run is a process of its own and takes the same number of optimizer steps in one round: all on
one shard, or spread over several, whose proxies rest on the disk and are averaged at the end. With a copy of diffusers'
`train_text_to_image.py`, that script trains the same model on the same images, too.

    python -m benchmarks.memory_sd15 --output_dir runs/memory_sd15
    python -m benchmarks.memory_sd15 --base_channels 128 --shards 1 8 --upstream_script train_text_to_image.py \
        --output_dir runs/memory_mid

The first needs about 16 GB of free memory and 40 GB of disk; the second, of 142 million parameters, a fifth of that.
Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

from sd_memguard.assets import demo_data_path

TARGET, TARGET_UPSTREAM = 1.10, 1.05
"""Most that several shards may take relative to one, and relative to upstream's plain run."""


class Run(NamedTuple):
    """One training run: peak of the anonymous memory and size of the UNet in bytes, and wall-clock seconds."""

    peak_bytes: int
    unet_bytes: int
    seconds: float


class PeakMemory(threading.Thread):
    """Samples a process's anonymous active memory every 5 ms and keeps the highest value, in bytes.

    Args:
        process: its number, or ``self``.
    """

    def __init__(self, process: int | str = "self") -> None:
        super().__init__(daemon=True)
        self.process, self.peak = process, 0
        self.start()

    def now(self) -> int:
        """Return the present value, 0 for a process that is over."""
        try:
            lines = Path(f"/proc/{self.process}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)

    def run(self) -> None:
        """Sample until this process ends."""
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)


def make_networks(base_channels: int, *, real: bool) -> "tuple[UNet2DConditionModel, AutoencoderKL]":
    """Return UNet and VAE with random weights, see ``make_pipeline``."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

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
        block_out_channels=(128, 256, 512, 512) if real else (32,) * 4,
        layers_per_block=2 if real else 1,
        latent_channels=4,
    )
    return unet, vae


def make_pipeline(folder: Path, base_channels: int, *, real: bool = False) -> None:
    """Write a pipeline whose UNet is that of SD 1.5 (``base_channels`` 320), with random weights.

    Args:
        folder: of the pipeline.
        base_channels: channels of the UNet's first level.
        real: whether the VAE and the text encoder have the sizes of SD 1.5, too, rather than small ones that fit.
    """
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from sd_memguard import assets

    torch.manual_seed(0)
    unet, vae = make_networks(base_channels, real=real)
    layers, inner = (12, 3072) if real else (1, 768)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=12, eos_token_id=49407
    )
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


def train_once(pipeline: Path, folder: Path, num_shards: int, resolution: int, steps: int, store: str) -> Run:
    """Train in this process and return what it took."""
    memory, start = PeakMemory(), time.monotonic()
    from sd_memguard.config import make_train_config
    from sd_memguard.training.trainer import train

    result = train(
        make_train_config(
            pretrained_model_name_or_path=str(pipeline),
            train_data_dir="bundled",
            max_train_samples=8,
            resolution=resolution,
            center_crop=True,
            output_dir=str(folder),
            train_batch_size=1,
            max_train_steps=steps,
            num_shards=num_shards,
            steps_per_round=steps,
            proxy_store=store,
            checkpointing_steps=1000,
            seed=0,
        )
    )
    if result.global_step != steps or result.summary["empty_steps"]:
        raise RuntimeError(f"the run did not take its {steps} steps: {result.summary}")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return Run(memory.peak, unet.stat().st_size, round(time.monotonic() - start, 1))


def train_upstream(script: Path, pipeline: Path, folder: Path, resolution: int, steps: int) -> Run:
    """Train by upstream's script in a process of its own and return what it took."""
    data = folder.parent / "data"
    data.mkdir()
    rows = (demo_data_path() / "metadata.jsonl").read_text().splitlines()[:8]
    for row in rows:
        name = json.loads(row)["file_name"]
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(demo_data_path() / name, data / name)
    (data / "metadata.jsonl").write_text("\n".join(rows))
    flags = {
        "pretrained_model_name_or_path": pipeline,
        "train_data_dir": data,
        "resolution": resolution,
        "train_batch_size": 1,
        "max_train_steps": steps,
        "checkpointing_steps": 1000,
        "cache_dir": folder.parent / "hub",
        "seed": 0,
        "output_dir": folder,
    }
    command = [sys.executable, str(script), "--center_crop", *(f"--{name}={value}" for name, value in flags.items())]
    start = time.monotonic()
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=offline, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        memory = PeakMemory(process.pid)
    if process.returncode:
        raise RuntimeError(f"upstream's script ended with {process.returncode}")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return Run(memory.peak, unet.stat().st_size, round(time.monotonic() - start, 1))


def in_own_process(function: Any, *arguments: Any) -> Any:
    """Return what a function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def report(runs: dict[str, Run], ratios: dict[str, float]) -> str:
    """Return the figures as a table of Markdown."""
    lines = ["| run | peak anonymous memory | in UNets of float32 | seconds |", "|---|---|---|---|"]
    for name, run in runs.items():
        in_unets = run.peak_bytes / run.unet_bytes
        lines.append(f"| {name} | {run.peak_bytes / 1e9:.2f} GB | {in_unets:.2f} | {run.seconds:.0f} |")
    return "\n".join([*lines, "", *(f"{name}: {ratio:.3f}" for name, ratio in ratios.items())])


def main() -> None:
    """Run the benchmark; exit with status 1 where several shards take more than they may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of memory_sd15.json")
    parser.add_argument("--work_dir", type=Path, help="folder of the temporary files (default: the system's)")
    parser.add_argument("--base_channels", type=int, default=320, help="channels of the UNet's first level")
    parser.add_argument("--resolution", type=int, default=64, help="side of the images in pixels")
    parser.add_argument(
        "--shards", type=int, nargs="+", default=[1, 2], help="numbers of shards, the first to compare with"
    )
    parser.add_argument("--proxy_store", choices=["disk", "ram"], default="disk", help="where the proxies rest")
    parser.add_argument("--upstream_script", type=Path, help="a copy of diffusers' script")
    settings = parser.parse_args()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="memory-sd15-", dir=settings.work_dir))
    steps = max(settings.shards)
    runs: dict[str, Run] = {}
    try:
        in_own_process(make_pipeline, work / "pipeline", settings.base_channels)
        run: tuple[Any, ...] = (work / "pipeline", work / "run")
        for num_shards in settings.shards:
            runs[f"{num_shards} shard(s)"] = in_own_process(
                train_once, *run, num_shards, settings.resolution, steps, settings.proxy_store
            )
            shutil.rmtree(work / "run")
        if settings.upstream_script is not None:
            script, (pipeline, folder) = settings.upstream_script, run
            runs["upstream"] = train_upstream(script, pipeline, folder, settings.resolution, steps)
    finally:
        shutil.rmtree(work)
    first, *others = (f"{num_shards} shard(s)" for num_shards in settings.shards)
    pairs = [(other, first, TARGET) for other in others]
    if "upstream" in runs:
        pairs += [(name, "upstream", TARGET_UPSTREAM) for name in (first, *others)]
    measured = {(a, b): runs[a].peak_bytes / runs[b].peak_bytes for a, b, _ in pairs}
    ratios = {f"{a} / {b} (at most {target:.2f} wanted)": measured[a, b] for a, b, target in pairs}
    record = {
        "base_channels": settings.base_channels,
        "resolution": settings.resolution,
        "proxy_store": settings.proxy_store,
        "steps": steps,
        "runs": {name: run._asdict() for name, run in runs.items()},
        "ratios": ratios,
    }
    (settings.output_dir / "memory_sd15.json").write_text(json.dumps(record, indent=1) + "\n")
    print(report(runs, ratios))
    raise SystemExit(any(measured[a, b] > target for a, b, target in pairs))


if __name__ == "__main__":
    main()
