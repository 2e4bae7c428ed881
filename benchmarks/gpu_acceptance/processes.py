"""Window 2: several processes, NCCL, an error on one rank, and diffusers' own scripts under the launcher."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_acceptance.rows import Check, Place, require
from sd_memguard.assets import demo_data_path, tiny_sd_path

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 60
"""In which all processes must be gone when one of them has met an error."""

AVERAGE = """
import sys, torch, torch.distributed as dist
from sd_memguard.distributed import ProcessGroup
from sd_memguard.proxies.full import FullProxies
from sd_memguard.proxies.store import RamStore

dist.init_process_group("gloo")
rank, device = dist.get_rank(), torch.device(sys.argv[1])
torch.manual_seed(0)
layer = torch.nn.Linear(64, 64).to(device)
before = {name: p.detach().cpu().clone() for name, p in layer.named_parameters()}
optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
proxies = FullProxies(dict(layer.named_parameters()), optimizer, 2, RamStore(), exchange=ProcessGroup("cpu"))
with torch.no_grad():
    for parameter in layer.parameters():
        parameter.add_(2.0 * rank)
distances = proxies.average([1.0, 3.0])
for name, parameter in layer.named_parameters():
    torch.testing.assert_close(parameter.detach().cpu(), before[name] + 1.5)
assert len(distances) == 2 and distances[0] > distances[1] > 0
dist.barrier()
dist.destroy_process_group()
"""

RAISES = """
import os, sys
from sd_memguard.training import trainer
from sd_memguard.train import main

take = trainer.Trainer.step

def step(self, *args):
    if os.environ["RANK"] == "1" and self.progress.global_step >= 2:
        print("raised", flush=True)
        raise ZeroDivisionError("an error of one rank")
    return take(self, *args)

trainer.Trainer.step = step
main(sys.argv[1:])
"""


def torchrun(
    script: str, arguments: list[str], folder: Path, *, on_cpu: bool, seconds: float = 300
) -> tuple[int, str, float]:
    """Run a script in two processes; returns the status, what was written, and the seconds after ``raised``."""
    file = folder / f"script-{time.monotonic_ns()}.py"
    file.write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if on_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    written = file.with_suffix(".txt")
    with written.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, *arguments], stdout=output, stderr=output, env=environment, cwd=ROOT, start_new_session=True
        )
    raised, deadline = None, time.monotonic() + seconds
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            if raised is None and "raised" in written.read_text(encoding="utf-8"):
                raised = time.monotonic()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher alone would leave its ranks behind
    return process.wait(), written.read_text(encoding="utf-8"), time.monotonic() - (raised or time.monotonic())


def two_ranks(place: Place) -> dict[str, Any]:
    """Two processes, on one GPU where there is one, average their proxies through the host (gloo)."""
    status, output, _ = torchrun(AVERAGE, [str(place.device)], place.folder, on_cpu=False)
    require(status == 0, f"the processes ended with {status}: {output[-500:]}")
    return {"device": str(place.device)}


def rank_that_raises(place: Place) -> dict[str, Any]:
    """An error in one process ends the other one soon (on the CPU: NCCL takes no two processes on one GPU)."""
    arguments = ["--pretrained", "bundled", "--train_data_dir", "bundled", "--max_train_samples", "32"]
    arguments += ["--resolution", "64", "--train_batch_size", "2", "--max_train_steps", "1000", "--num_shards", "2"]
    arguments += ["--steps_per_round", "100", "--output_dir", str(place.new_folder("raises"))]
    status, output, seconds = torchrun(RAISES, arguments, place.folder, on_cpu=True)
    require("an error of one rank" in output, f"the error is not told: {output[-500:]}")
    require(status not in (0, -9), f"the launcher ended with {status}")
    require(seconds < MOST_SECONDS, f"it took {seconds:.0f} s until all were gone")
    return {"seconds": seconds}


def nccl(place: Place) -> dict[str, Any]:
    """NCCL takes every collective with every precision that is sent."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    dist.init_process_group("nccl", init_method=f"tcp://localhost:{port}", world_size=1, rank=0)
    try:
        used = {
            "all_reduce": (torch.float32, torch.float64, torch.int32, torch.int64),
            "all_gather": (torch.float64, torch.int64, torch.uint8),
            "broadcast": (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8),
        }
        for name, kinds in used.items():
            for dtype in kinds:
                tensor = torch.arange(5, device=place.device).to(dtype)
                other = torch.zeros_like(tensor)
                calls: dict[str, Callable[[], Any]] = {
                    "all_reduce": partial(dist.all_reduce, tensor),
                    "all_gather": partial(dist.all_gather, [other], tensor),
                    "broadcast": partial(dist.broadcast, tensor, 0),
                }
                calls[name]()
                found = other if name == "all_gather" else tensor
                require(found.tolist() == [0, 1, 2, 3, 4], f"{name} of {dtype} gives {found.tolist()}")
    finally:
        dist.destroy_process_group()
    return {"collectives": sum(map(len, used.values()))}


def script(name: str, precision: str, flags: tuple[str, ...] = ()) -> Callable[[Place], dict[str, Any]]:
    """Return the check of one of diffusers' scripts under the launcher."""

    def check(place: Place) -> dict[str, Any]:
        assert place.scripts is not None
        output = place.new_folder("script")
        arguments = ["--pretrained_model_name_or_path", str(tiny_sd_path()), "--train_data_dir", str(demo_data_path())]
        arguments += ["--max_train_samples", "32", "--resolution", "64", "--train_batch_size", "4", "--seed", "0"]
        arguments += ["--max_train_steps", "12", "--output_dir", str(output), "--mixed_precision", precision, *flags]
        guard = ["--num_shards", "2", "--steps_per_round", "3"]
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "sd_memguard.run", *guard, str(place.scripts / name), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        require(done.returncode == 0, f"the script ended with {done.returncode}: {done.stderr[-500:]}")
        require((output / "memguard/rounds.jsonl").is_file(), "the guard has left no records")
        return {"seconds": time.monotonic() - start}

    return check


SCRIPTS = ("text_to_image/train_text_to_image.py", "text_to_image/train_text_to_image_lora.py")
CHECKS = [
    Check("two_ranks", two_ranks),
    Check("nccl", nccl, ("cuda",)),
    Check("rank_that_raises", rank_that_raises),
    *(
        Check(f"{Path(name).stem}_{precision}", script(name, precision), ("scripts", "datasets", *needs))
        for name in SCRIPTS
        for precision, needs in (("fp16", ("cuda",)), ("bf16", ()))
    ),
]
