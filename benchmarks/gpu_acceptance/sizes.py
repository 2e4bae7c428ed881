"""Window 3: the shapes of SD 1.5 and SDXL with random weights, at 512 px and in bf16."""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from benchmarks.gpu_acceptance.rows import Check, Place, require
from benchmarks.memory_sd15 import make_networks
from sd_memguard import GuardConfig, MemorizationGuard
from sd_memguard.proxies.full import FullProxies
from sd_memguard.proxies.store import RamStore

ROOT = Path(__file__).parents[2]
MOST_STEP, MOST_MEMORY, LEAST_RATE = 1.05, 1.10, 1.25
SDXL = {
    "sample_size": 64,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
SMALL = {**SDXL, "block_out_channels": (32, 64, 64), "attention_head_dim": (2, 4, 4), "cross_attention_dim": 64}
SMALL |= {"transformer_layers_per_block": (1, 1, 1)}
"""The same kind of network for a machine without a GPU."""


def step_against_bare(size: str, *flags: str) -> Callable[[Place], dict[str, Any]]:
    """Return the check of a guarded step against the bare loop, by `benchmarks.step`."""

    def check(place: Place) -> dict[str, Any]:
        folder = place.new_folder("step")
        device = ["--device", place.device.type]
        if place.device.type == "cuda":
            device += ["--mixed_precision", "bf16"]
        command = [sys.executable, "-m", "benchmarks.step", "--size", size, *device, *flags, "--turns", "6"]
        done = subprocess.run([*command, "--output_dir", str(folder)], cwd=ROOT, capture_output=True, text=True)
        require(done.returncode == 0, done.stderr[-500:])
        record = json.loads((folder / "step.json").read_text())
        ratios = {name: quartiles[1] for name, quartiles in record["ratios"].items() if name != "bare"}
        if place.device.type == "cuda":  # the processor's time on a machine with other work says little
            require(ratios["guarded"] <= MOST_STEP, f"a guarded step takes {ratios['guarded']:.3f} bare ones")
        return {**ratios, "bare_s": record["seconds"]["bare"]}

    return check


def row_gate(place: Place) -> dict[str, Any]:
    """A loop around SDXL's UNet with one added line, against the same without it."""
    on_gpu = place.device.type == "cuda"
    dtype, side = (torch.bfloat16, 64) if on_gpu else (torch.float32, 16)
    times: dict[str, float] = {}
    for name in ("bare", "guarded"):
        torch.manual_seed(0)
        with torch.device(place.device):
            sizes: dict[str, Any] = {**(SDXL if on_gpu else SMALL)}
            unet = UNet2DConditionModel(**sizes).to(dtype)
        unet.train().enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(unet.parameters(), 1e-6, fused=True)
        if name == "guarded":
            guard = MemorizationGuard(GuardConfig(), device=place.device)
            guard.attach(unet, optimizer)
        latents = torch.randn(2, 4, side, side, device=place.device, dtype=dtype)
        embeddings = torch.randn(2, 77, sizes["cross_attention_dim"], device=place.device, dtype=dtype)
        durations = []
        for _ in range(6):
            start = time.perf_counter()
            timesteps = torch.randint(1000, (2,), device=place.device)
            loss = (
                (unet(latents, timesteps, embeddings, return_dict=False)[0].float() - latents.float()).square().mean()
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if on_gpu:
                torch.cuda.synchronize()
            durations.append(time.perf_counter() - start)
        times[name] = statistics.median(durations[2:])
        del unet, optimizer
        gc.collect()
    ratio = times["guarded"] / times["bare"]
    if on_gpu:
        require(ratio <= MOST_STEP, f"a guarded step takes {ratio:.3f} bare ones")
    return {"ratio": ratio, "bare_s": times["bare"]}


@cache
def sd15(device: torch.device) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """Return the networks of SD 1.5's shapes; on the CPU small ones."""
    torch.manual_seed(0)
    unet, vae = make_networks(320 if device.type == "cuda" else 32, real=device.type == "cuda")
    return unet.to(device), vae.to(device).requires_grad_(False)


def proxies_of(place: Place, num_shards: int) -> tuple[FullProxies, torch.optim.Optimizer]:
    """Return proxies of SD 1.5's UNet with an optimizer that has taken a step."""
    unet, _ = sd15(place.device)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-6, fused=True)
    parameters = dict(unet.named_parameters())
    proxies = FullProxies(parameters, optimizer, num_shards, RamStore())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return proxies, optimizer


def peak_memory(place: Place) -> dict[str, Any]:
    """Eight proxies take the device's memory of one."""
    peaks = {}
    for num_shards in (1, 8):
        torch.cuda.reset_peak_memory_stats()
        proxies, optimizer = proxies_of(place, num_shards)
        for shard_index in range(min(num_shards, 2)):
            proxies.activate(shard_index)
        proxies.average([1.0] * num_shards)
        peaks[num_shards] = torch.cuda.max_memory_allocated()
        del proxies, optimizer
        gc.collect()
    ratio = peaks[8] / peaks[1]
    require(ratio <= MOST_MEMORY, f"eight proxies take {ratio:.3f} times the memory of one")
    return {"ratio": ratio, "gigabytes": peaks[8] / 1e9}


def round_seconds(place: Place) -> dict[str, Any]:
    """Seconds of a switch, an average and a checkpoint of two proxies."""
    proxies, _ = proxies_of(place, 2)
    proxies.activate(1)
    folder = place.new_folder("checkpoint")
    folder.mkdir(parents=True)
    work: dict[str, Callable[[], Any]] = {
        "switch_s": lambda: proxies.activate(0),
        "average_s": lambda: proxies.average([1.0, 1.0]),
        "checkpoint_s": lambda: proxies.save(folder),
    }
    seconds = {}
    for name, call in work.items():
        start = time.perf_counter()
        call()
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
    return seconds


@torch.no_grad()
def cache_rates(place: Place) -> dict[str, Any]:
    """Images per second that the VAE encodes for the cache, by the number at once."""
    on_gpu = place.device.type == "cuda"
    _, vae = sd15(place.device)
    vae = vae.to(torch.bfloat16) if on_gpu else vae
    rates = {}
    for count in (8, 32) if on_gpu else (2,):
        pixels = torch.randn(
            count, 3, 512 if on_gpu else 64, 512 if on_gpu else 64, device=place.device, dtype=vae.dtype
        )
        vae.encode(pixels)
        start = time.perf_counter()
        for _ in range(3):
            vae.encode(pixels)
        if on_gpu:
            torch.cuda.synchronize()
        rates[f"images_per_s_{count}"] = 3 * count / (time.perf_counter() - start)
    return rates


def upstream(place: Place) -> dict[str, Any]:
    """Images per second against diffusers' script, on the bundled model."""
    assert place.scripts is not None
    script, folder = place.scripts / "text_to_image/train_text_to_image.py", place.new_folder("upstream")
    command = [sys.executable, "-m", "benchmarks.upstream_speed", "--upstream_script", str(script), "--turns", "1"]
    command += ["--clock", "wall", "--output_dir", str(folder), "--mixed_precision", "bf16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    require(done.returncode == 0, done.stderr[-500:])
    print(done.stdout, flush=True)
    return {"report": done.stdout.strip().splitlines()[-1], "wanted": LEAST_RATE}


CHECKS = [
    Check("step_bundled", step_against_bare("bundled")),
    Check("step_sd15", step_against_bare("sd15"), ("cuda",)),
    Check("step_sd15_compiled", step_against_bare("sd15", "--compile"), ("cuda",)),
    Check("row_gate", row_gate),
    Check("peak_memory", peak_memory, ("cuda",)),
    Check("round_seconds", round_seconds),
    Check("cache_rates", cache_rates),
    Check("upstream", upstream, ("cuda", "scripts", "datasets")),
]
