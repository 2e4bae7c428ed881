"""Window 1: the bundled model in every precision, kind of proxy and setting, and what may go wrong in a run."""

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu_acceptance.rows import Check, Place, require
from sd_memguard.config import make_train_config
from sd_memguard.core.async_copy import AsyncCPUCopy, to_device
from sd_memguard.core.memory_bank import LossMemoryBank
from sd_memguard.runs.checkpoint import list_checkpoints, verify_checkpoint
from sd_memguard.training import trainer as loop
from sd_memguard.training.build import make_accelerator
from sd_memguard.training.failures import OutOfMemoryError
from sd_memguard.training.loss import DenoisingLoss
from sd_memguard.training.optimizer_step import ClippedStep
from sd_memguard.training.plan import make_plan
from sd_memguard.training.signals import Interrupted
from sd_memguard.training.trainer import Trainer, TrainResult, train

UNET = Path("unet/diffusion_pytorch_model.safetensors")
STEPS = 12
PRECISIONS = ("no", "bf16", "fp16")
VARIANTS: dict[str, dict[str, Any]] = {
    "one": {"num_shards": 1},
    "four_ram": {"num_shards": 4, "steps_per_round": 1, "proxy_store": "ram"},
    "four_disk": {"num_shards": 4, "steps_per_round": 1, "proxy_store": "disk"},
    "four_lora": {"num_shards": 4, "steps_per_round": 1, "proxy": "lora"},
}
FLAGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "ema": ({"use_ema": True}, ()),
    "offload_ema": ({"use_ema": True, "offload_ema": True}, ()),
    "foreach_ema": ({"use_ema": True, "foreach_ema": True}, ()),
    "8bit_adam": ({"use_8bit_adam": True}, ("bitsandbytes",)),
    "xformers": ({"enable_xformers_memory_efficient_attention": True}, ("cuda", "xformers")),
    "compile": ({"compile": True}, ("cuda",)),
    "tf32": ({"allow_tf32": True}, ()),
    "checkpointing": ({"gradient_checkpointing": True}, ()),
    "augment": ({"augment_threshold": 1.2, "random_affine": 0.0}, ()),
    "dream": ({"dream_training": True}, ()),
    "snr": ({"snr_gamma": 5.0}, ()),
    "probes": ({"validation_data_dir": "bundled"}, ()),
    "workers": ({"dataloader_num_workers": 2, "cache_latents": "off"}, ()),
}


def run(place: Place, **settings: Any) -> TrainResult:
    """Train the bundled model for a few steps under a guard that decides early."""
    begin_anew()
    defaults = {
        "pretrained": "bundled",
        "train_data_dir": "bundled",
        "max_train_samples": 32,
        "resolution": 64,
        "train_batch_size": 4,
        "max_train_steps": STEPS,
        "learning_rate": 1e-5,
        "lr_warmup_steps": 0,
        "skip_threshold": 0.95,
        "mixed_precision": "no",
        "seed": 0,
        "output_dir": str(place.new_folder("run")),
    }
    return train(make_train_config(**{**defaults, **settings}))


def begin_anew() -> None:
    """Forget the precision of the run before, which accelerate keeps for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def weights(result: TrainResult) -> dict[str, Tensor]:
    """Return the trained UNet."""
    return load_file(result.output_dir / UNET)


def check_result(result: TrainResult) -> dict[str, Any]:
    """Require a whole run with finite weights, and return its figures."""
    require(result.global_step == STEPS, f"{result.global_step} of {STEPS} steps were taken")
    bad = [name for name, tensor in weights(result).items() if not bool(torch.isfinite(tensor).all())]
    require(not bad, f"weights that are not finite: {bad[:3]}")
    names = ("skipped_fraction", "nonfinite_steps", "images_per_second")
    return {name: result.summary[name] for name in names}


# The device.


def async_copy(place: Place) -> dict[str, Any]:
    """A copy to the host holds the value of its moment, and is asked for without waiting for what is queued."""
    matrix = torch.randn(4096, 4096, device=place.device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        product = matrix @ matrix
    value = torch.full((8,), 3.0, device=place.device)
    copy = AsyncCPUCopy(value + 0 * product[0, :8].nan_to_num())
    for _ in range(200):
        product = matrix @ matrix
    asked = time.perf_counter() - start
    arrived = copy.wait().clone()
    waited = time.perf_counter() - start
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    require(bool(torch.equal(arrived, torch.full((8,), 3.0))), f"the copy holds {arrived.tolist()}")
    require(asked < 0.5 * whole, f"the host waited {asked:.3f} s of {whole:.3f} s before it could ask")
    require(waited < 0.9 * whole, "the copy waited for work that was queued after it")
    return {"asked_s": asked, "arrived_s": waited, "all_s": whole}


def pinned_reuse(place: Place) -> dict[str, Any]:
    """Pinned memory that is used again does not change what is still on its way."""
    sent = []
    busy = torch.randn(4096, 4096, device=place.device)
    for number in range(200):
        busy = busy @ busy.clamp(-1e-3, 1e-3)
        sent.append(to_device(torch.full((1 << 16,), float(number)), place.device))
    wrong = [number for number, tensor in enumerate(sent) if not bool((tensor == number).all())]
    require(not wrong, f"{len(wrong)} of 200 tensors have the content of another one")
    return {"tensors": len(sent)}


def fused_step(place: Place) -> dict[str, Any]:
    """The fused AdamW leaves weights and moments alone at a NaN, and clips as torch does."""
    begin_anew()
    accelerator = make_accelerator(make_train_config(pretrained="bundled", train_data_dir="bundled").of_kind("sd"))
    parameters = [torch.nn.Parameter(torch.randn(64, 64, device=place.device)) for _ in range(4)]
    plain = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    optimizer, reference = torch.optim.AdamW(parameters, 1e-2, fused=True), torch.optim.AdamW(plain, 1e-2)
    step = ClippedStep(accelerator, optimizer, parameters, 1.0)

    def take(*, bad: bool) -> None:
        for one, other in zip(parameters, plain, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = 2 * one.grad
        if bad:
            parameters[1].grad[0, 0] = math.nan  # type: ignore[index]
        step.step(scale=2.0).wait()

    for _ in range(3):
        take(bad=False)
        torch.nn.utils.clip_grad_norm_(plain, 1.0)
        reference.step()
    difference = max(float((a - b).abs().max()) for a, b in zip(parameters, plain, strict=True))
    before = [parameter.detach().clone() for parameter in parameters]
    take(bad=True)
    require(all(bool(torch.equal(a, b)) for a, b in zip(parameters, before, strict=True)), "a NaN moved the weights")
    require(difference < 1e-5, f"steps differ from torch's by {difference:.1e}")
    return {"largest_difference": difference}


def bank_updates(place: Place) -> dict[str, Any]:
    """Banks that see the same batches are the same to the bit, however often it is tried."""
    banks = [LossMemoryBank(1000, device=place.device) for _ in range(8)]
    host = LossMemoryBank(1000)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        timesteps = torch.randint(0, 20, (256,), generator=generator)
        losses = torch.rand(256, generator=generator)
        for bank in banks:
            bank.update(timesteps.to(place.device), losses.to(place.device))
        host.update(timesteps, losses)
    same = all(bool(torch.equal(bank.sums, banks[0].sums)) for bank in banks)
    require(same, "banks that saw the same batches differ")
    apart = float((banks[0].curve().cpu() - host.curve()).abs().nan_to_num().max())
    require(apart < 1e-5, f"the bank is {apart:.1e} away from that of the CPU")
    return {"away_from_cpu": apart}


def host_waits(place: Place) -> dict[str, Any]:
    """A step makes the host wait once: for its losses, behind the forward."""
    steps: list[int] = []
    waits: list[int] = []
    found: list[str] = []
    take, wait = Trainer.step, AsyncCPUCopy.wait

    def step(trainer: Trainer, *args: Any) -> Any:
        steps.append(1)
        if len(steps) < 5:
            return take(trainer, *args)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return take(trainer, *args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                found.extend(str(one.message) for one in caught if "synchroniz" in str(one.message))

    def counted(copy: AsyncCPUCopy) -> Tensor:
        waits.append(len(steps))
        return wait(copy)

    with replaced(Trainer, "step", step), replaced(AsyncCPUCopy, "wait", counted):
        run(place, num_shards=1)
    late = [waits.count(number) for number in range(6, STEPS)]
    require(not found, f"{len(found)} synchronizations, the first: {found[:1]}")
    require(max(late) <= 2, f"{max(late)} waits in a step: one for the losses, one for the norm of the step before")
    return {"waits_per_step": max(late), "synchronizations": 0}


# Runs.


def variant(precision: str, name: str) -> Callable[[Place], dict[str, Any]]:
    """Return the check of a precision and kind of proxy."""
    return lambda place: check_result(run(place, mixed_precision=precision, **VARIANTS[name]))


def flag(settings: dict[str, Any]) -> Callable[[Place], dict[str, Any]]:
    """Return the check of a setting, under two shards."""
    return lambda place: check_result(run(place, num_shards=2, steps_per_round=3, **settings))


def switch(place: Place) -> dict[str, Any]:
    """A proxy that was offloaded comes back to the bit, its optimizer's state too."""
    config = make_train_config(
        pretrained="bundled",
        train_data_dir="bundled",
        max_train_samples=32,
        resolution=64,
        train_batch_size=4,
        max_train_steps=STEPS,
        num_shards=2,
        mixed_precision="no",
        seed=0,
        output_dir=str(place.new_folder("switch")),
    )
    begin_anew()
    plan = make_plan(config)
    trainer = Trainer(plan, make_accelerator(plan.config))
    for parameter in trainer.parameters:
        parameter.grad = torch.randn_like(parameter)
    trainer.optimizer_step.step(1.0)
    state = {name: tensor.clone() for part in trainer.proxies.averaged_parts for name, tensor in _part(trainer, part)}
    moments = {name: tensor.clone() for name, tensor in _part(trainer, "optimizer")}
    start = time.perf_counter()
    for shard_index in (1, 0):
        trainer.proxies.activate(shard_index)
    seconds = (time.perf_counter() - start) / 2
    after = dict(_part(trainer, "weights")) | dict(_part(trainer, "optimizer"))
    changed = [name for name, tensor in {**state, **moments}.items() if not torch.equal(after[name], tensor)]
    require(not changed, f"{len(changed)} tensors have changed, the first: {changed[:1]}")
    return {"seconds": seconds}


def _part(trainer: Trainer, part: str) -> list[tuple[str, Tensor]]:
    return list(trainer.proxies._active_part(part).items())


def resume(place: Place) -> dict[str, Any]:
    """A run that was stopped and gone on with ends with the bytes of one that was not."""
    settings = {"num_shards": 2, "steps_per_round": 3}
    with deterministic():
        whole = weights(run(place, **settings))
        folder = place.new_folder("stopped")
        with stopped_at(7):
            try:
                run(place, **settings, output_dir=str(folder))
            except Interrupted as error:
                require(error.code == 128 + signal.SIGTERM, f"the run ended with {error.code}")
        (saved,) = list_checkpoints(folder)
        verify_checkpoint(saved)
        parts = weights(run(place, **settings, output_dir=str(folder), resume_from_checkpoint="latest"))
    different = [name for name, tensor in whole.items() if not torch.equal(parts[name], tensor)]
    require(not different, f"{len(different)} tensors differ, the first: {different[:1]}")
    return {"saved": saved.name}


def injected_nan(place: Place) -> dict[str, Any]:
    """A loss that is not a number costs one step."""
    compute, calls = DenoisingLoss.__call__, []

    def poisoned(loss: DenoisingLoss, *args: Any, **options: Any) -> Tensor:
        calls.append(1)
        losses = compute(loss, *args, **options)
        return losses * (math.nan if len(calls) == 5 else 1.0)

    with replaced(DenoisingLoss, "__call__", poisoned):
        figures = check_result(run(place, memguard="off"))
    require(figures["nonfinite_steps"] == 1, f"{figures['nonfinite_steps']} steps were skipped")
    return figures


def out_of_memory(place: Place) -> dict[str, Any]:
    """An exhausted memory is explained, and leaves the process usable."""
    total = torch.cuda.get_device_properties(place.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated() + 2e8) / total))
    try:
        run(place, train_batch_size=512, max_train_samples=None)
    except OutOfMemoryError as error:
        require("--train_batch_size 256" in str(error), f"the message names no way out: {error}")
    else:
        require(False, "the run fitted in 200 MB")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return check_result(run(place))


@contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Put something in an attribute's place for a while."""
    before = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Let a SIGTERM arrive in a step."""
    take, calls = loop.Trainer.step, []

    def step_and_signal(trainer: Trainer, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return take(trainer, *args)

    with replaced(loop.Trainer, "step", step_and_signal):
        yield


@contextmanager
def deterministic() -> Iterator[None]:
    """Use algorithms whose result does not depend on the order of threads."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CHECKS = [
    Check("async_copy", async_copy, ("cuda",)),
    Check("pinned_reuse", pinned_reuse, ("cuda",)),
    Check("fused_step", fused_step),
    Check("bank_updates", bank_updates),
    Check("host_waits", host_waits, ("cuda",)),
    Check("switch", switch),
    Check("resume", resume),
    Check("injected_nan", injected_nan),
    Check("out_of_memory", out_of_memory, ("cuda",)),
    *(
        Check(f"run_{precision}_{name}", variant(precision, name), ("cuda",) if precision == "fp16" else ())
        for precision in PRECISIONS
        for name in VARIANTS
    ),
    *(Check(f"flag_{name}", flag(settings), needs) for name, (settings, needs) in FLAGS.items()),
]
