"""What the row gate costs per training step, in time and memory, against the same loop without it.

Steps with and without the gate alternate in one process, and the processor's seconds of each are compared; the peak
memory of each is that of a process of its own. The judge is a memory bank as in training.

    python -m benchmarks.gate --size small
    python -m benchmarks.gate --size 120M --batch_size 2
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sd_memguard.core.bands import classify
from sd_memguard.core.memory_bank import LossMemoryBank
from sd_memguard.plugin.gate import RowBatch, RowGate

SIZES = {
    "small": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32, "norm_num_groups": 8},
    "120M": {"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 768},
}


class TimedGate(RowGate):
    """A gate that adds up the processor's seconds that it takes itself, in its hooks."""

    seconds = 0.0

    def _gate(self, *args: Any) -> Any:
        return self._timed(super()._gate, *args)

    def _pass_on(self, *args: Any) -> Any:
        return self._timed(super()._pass_on, *args)

    def _before_step(self, *args: Any) -> Any:
        return self._timed(super()._before_step, *args)

    def _timed(self, work: Callable[..., Any], *args: Any) -> Any:
        start = time.process_time()
        result = work(*args)
        self.seconds += time.process_time() - start
        return result


class Loop:
    """A training loop around a UNet of random weights."""

    def __init__(self, size: str, batch_size: int, latent_size: int, accumulation: int) -> None:
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(**SIZES[size])
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-6, fused=True)
        self.bank = LossMemoryBank()
        self.latents = torch.randn(batch_size, 4, latent_size, latent_size)
        self.embeddings = torch.randn(batch_size, 77, self.unet.config.cross_attention_dim)
        self.accumulation = accumulation
        self.gate_seconds: list[float] = []

    def judge(self, losses: Tensor, bins: Tensor, batch: RowBatch) -> Tensor:
        """Skip by the memory bank, as a guard does."""
        clean = classify(self.bank.loss_ratio(bins, losses), 0.8, 0.0).clean_mask
        self.bank.update(bins, losses)
        return clean.float()

    def step(self, gated: bool) -> tuple[float, float]:
        """Take a step; return the seconds of the processor and of the clock."""
        gate = TimedGate(self.unet, self.optimizer, self.judge, grad_scale=lambda: 1.0) if gated else None
        start = time.process_time(), time.perf_counter()
        for _ in range(self.accumulation):
            timesteps = torch.randint(1000, (len(self.latents),))
            predicted = self.unet(self.latents, timesteps, self.embeddings, return_dict=False)[0]
            (torch.nn.functional.mse_loss(predicted, self.latents) / self.accumulation).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.process_time() - start[0], time.perf_counter() - start[1]
        if gate is not None:
            gate.remove()
            self.gate_seconds.append(gate.seconds)
        return seconds


def peak_memory(arguments: argparse.Namespace, gated: bool) -> int:
    """Return the peak memory of a process that takes a few steps, in bytes."""
    flags = [f"--{name}={value}" for name, value in vars(arguments).items() if name not in ("memory_of", "steps")]
    command = [
        sys.executable,
        "-m",
        "benchmarks.gate",
        *flags,
        "--steps=3",
        f"--memory_of={'gate' if gated else 'none'}",
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--latent_size", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--memory_of", choices=["none", "gate"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loop = Loop(arguments.size, arguments.batch_size, arguments.latent_size, arguments.accumulation)
    if arguments.memory_of:
        for _ in range(arguments.steps):
            loop.step(arguments.memory_of == "gate")
        # not `ru_maxrss`, which starts from that of the process that has started this one
        status = Path("/proc/self/status").read_text()
        print(1024 * int(status.split("VmHWM:")[1].split()[0]))
        return
    for gated in (False, True):
        loop.step(gated)
    seconds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(arguments.steps):
        for gated in (False, True):
            seconds[gated].append(loop.step(gated))
    plain, gated_step = (statistics.median(s[0] for s in seconds[gated]) for gated in (False, True))
    figures = {
        "parameters": sum(p.numel() for p in loop.unet.parameters()),
        **{name: value for name, value in vars(arguments).items() if name != "memory_of"},
        "processor_seconds_plain": plain,
        "processor_seconds_gated": gated_step,
        "processor_seconds_in_the_gate": statistics.median(loop.gate_seconds),
        "difference_of_pairs": statistics.median(
            b[0] - a[0] for a, b in zip(seconds[False], seconds[True], strict=True)
        ),
        "peak_bytes_plain": peak_memory(arguments, False),
        "peak_bytes_gated": peak_memory(arguments, True),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
