"""What it costs to switch from one full-weight proxy to the next, in steps.

A UNet with the shapes of SD 1.5 and random weights takes two steps as each of three proxies, so that all have moments;
then the proxies take turns, and each switch is timed between steps. Seconds are of the processor, in one thread, and of
the clock, which on disk is mostly the disk's.

    python -m benchmarks.switch --output_dir runs/switch
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from benchmarks.memory_sd15 import make_pipeline
from sd_memguard.proxies.full import FullProxies
from sd_memguard.proxies.store import DiskStore, RamStore

NUM_PROXIES = 3


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of some work by the processor and by the clock."""
    start = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - start[0], time.perf_counter() - start[1]


def measure(unet: UNet2DConditionModel, store: RamStore | DiskStore, turns: int) -> dict[str, list[float]]:
    """Return the median seconds of a step and of a switch, each by processor and clock."""
    parameters = dict(unet.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-6, fused=True)
    proxies = FullProxies(parameters, optimizer, NUM_PROXIES, store)
    latents, embeddings = torch.randn(2, 4, 16, 16), torch.randn(2, 77, unet.config.cross_attention_dim)

    def step() -> None:
        timesteps = torch.randint(1000, (2,))
        (unet(latents, timesteps, embeddings, return_dict=False)[0] - latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    steps, switches = [], []
    for turn in range(turns * NUM_PROXIES):
        switch = timed(partial(proxies.activate, turn % NUM_PROXIES))
        taken = timed(step)
        if turn >= NUM_PROXIES + 1:  # all have moments, and nothing is shared any more
            switches.append(switch)
            steps.append(taken)
    return {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in (("step", steps), ("switch", switches))
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of switch.json")
    parser.add_argument("--base_channels", type=int, default=128, help="channels of the UNet's first level")
    parser.add_argument("--turns", type=int, default=4, help="of each proxy")
    settings = parser.parse_args()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_pipeline(Path(folder) / "pipeline", settings.base_channels)
        unet = UNet2DConditionModel.from_pretrained(Path(folder) / "pipeline", subfolder="unet")
        size = 4e-6 * sum(parameter.numel() for parameter in unet.parameters())
        record = {
            "ram": measure(unet, RamStore(), settings.turns),
            "disk": measure(unet, DiskStore(Path(folder) / "store"), settings.turns),
        }
    (settings.output_dir / "switch.json").write_text(json.dumps({"unet_mb": size, **record}, indent=1) + "\n")
    print(f"UNet of {size:.0f} MB; a proxy is three times that\n")
    print(
        "| store | step, processor (clock) | switch, processor (clock) | steps that a switch costs |\n|---|---|---|---|"
    )
    for name, seconds in record.items():
        step, switch = seconds["step"], seconds["switch"]
        figures = " | ".join(f"{one[0]:.2f} s ({one[1]:.2f} s)" for one in (step, switch))
        print(f"| {name} | {figures} | {switch[0] / step[0]:.1f} ({switch[1] / step[1]:.1f}) |")


if __name__ == "__main__":
    main()
