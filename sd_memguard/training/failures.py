"""What goes wrong in the middle of a run, told with the way out; the last checkpoint is untouched by all of it."""

import errno
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sd_memguard.config import TrainConfig
from sd_memguard.core.decision import Verdict
from sd_memguard.data.samples import Samples
from sd_memguard.errors import UserError
from sd_memguard.training.memory_estimate import gigabytes

MAX_NAMED = 8
"""Samples that a message about a step names."""
WINDOWS_DISK_FULL = {39, 112}
"""https://learn.microsoft.com/windows/win32/debug/system-error-codes--0-499-"""
GO_ON = "then go on with `--resume_from_checkpoint latest`"


class Seen(NamedTuple):
    """One batch that a step met: ids and timesteps (B,) int64, and what the guard said of it."""

    sample_ids: Tensor
    timesteps: Tensor
    verdict: Verdict


class NonFiniteError(RuntimeError):
    """Losses, gradients or weights are infinite or not a number; what is on disk was not changed by them."""


class OutOfMemoryError(UserError):
    """The device's memory does not suffice."""


class DiskFullError(UserError):
    """The disk is full; checkpoints written before are intact."""


@contextmanager
def explained_faults(config: TrainConfig) -> Iterator[None]:
    """Turn an exhausted memory or disk inside the block into an error that names the settings that help.

    Raises:
        OutOfMemoryError: the device is out of memory.
        DiskFullError: the disk of ``--output_dir`` is full, or the quota on it used up.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"the device is out of memory: {memory_advice(config)} ({error})") from error
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        free = gigabytes(shutil.disk_usage(config.output_dir).free)
        raise DiskFullError(
            f"the disk of `--output_dir` {config.output_dir} is full ({free} free): {error}. Older checkpoints "
            f"are intact; free some space, {GO_ON}. `--checkpoints_total_limit 1` keeps one checkpoint only"
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether an error means that the device has no memory left; but for CUDA's torch gives a plain one."""
    texts = ("MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def is_disk_full(error: BaseException) -> bool:
    """Say whether an error means that no room is left; safetensors gives the number in its text only."""
    numbers = {errno.ENOSPC, errno.EDQUOT}
    if isinstance(error, OSError):
        return error.errno in numbers
    system = numbers if os.name == "posix" else WINDOWS_DISK_FULL
    return any(f"os error {number})" in str(error) for number in system)


def memory_advice(config: TrainConfig) -> str:
    """Return which settings, not used yet, would make a run smaller, the cheapest first."""
    advice = {
        f"`--train_batch_size {config.train_batch_size // 2}` with `--gradient_accumulation_steps "
        f"{config.gradient_accumulation_steps * 2}` (the same result)": config.train_batch_size > 1,
        "`--gradient_checkpointing`": not config.gradient_checkpointing,
        "`--mixed_precision bf16`": config.mixed_precision in {None, "no"},
        "`--offload_ema`": config.use_ema and not config.offload_ema,
        "`--use_8bit_adam`": not config.use_8bit_adam,
        "`--proxy lora`": config.proxy == "full",
        "a smaller `--resolution`": True,
    }
    helpful = [text for text, applies in advice.items() if applies]
    return f"try {', '.join(helpful)}"


def check_finite(unet: nn.Module) -> None:
    """Refuse weights that must not be saved.

    Raises:
        NonFiniteError: names the first tensor that holds an infinite value or not a number.
    """
    for name, tensor in unet.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"the weights {name} are not finite, so nothing was saved; go on from the last checkpoint, which "
                "is untouched, with a lower `--learning_rate` or with `--mixed_precision bf16` or `no`"
            )


def describe_samples(seen: Sequence[Seen], samples: Samples) -> str:
    """Return which samples a step met at which timesteps: those with a bad loss, or all where each loss is good."""
    met = [
        (sample_id, timestep, loss)
        for one in seen
        for sample_id, timestep, loss in zip(
            one.sample_ids.tolist(), one.timesteps.tolist(), one.verdict.losses.tolist(), strict=True
        )
    ]
    bad = [row for row in met if not math.isfinite(row[2])] or met
    named = [f"sample {row[0]}, {samples.file(row[0])}, timestep {row[1]}" for row in bad[:MAX_NAMED]]
    more = [f"and {len(bad) - MAX_NAMED} more"] if len(bad) > MAX_NAMED else []
    return "; ".join([*named, *more]) or "augmented copies"
