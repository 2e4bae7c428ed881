"""What the launcher has to know of a script, and which cannot be guarded: known before torch is imported."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_memguard.environment import configured_spreading, launched_processes
from sd_memguard.errors import LoopError, UserError
from sd_memguard.launcher.arguments import Command

REFUSED_SOURCES: Mapping[str, str] = {
    r"^\s*(import|from) (jax|flax)\b": "it trains with Flax, and the guard is for torch",
    r"\bcolossalai\b|\bORTModule\b|\btorch_xla\b": (
        "it trains through another engine than torch's (ColossalAI, ONNX Runtime, XLA), where no hook sees a gradient"
    ),
    r"\blogsigmoid\b": (
        "it trains on preferences between pairs of images (DPO, ORPO): its loss is no squared error of one image, so a "
        "row of the gradient does not say how well an image is known"
    ),
    r"\bteacher_(unet|transformer)\b|\bpretrained_teacher_model\b": (
        "it distils a teacher: its loss compares two models' outputs and says nothing of how well an image is known"
    ),
    r"\bCustomDiffusion\w*Processor\w*\b": (
        "its loss is averaged over a mask of each image (custom diffusion), so that images of small masks would be "
        "taken for well known ones"
    ),
    r"\bdisc(riminator|_optimizer|r_optimizer)\b|\boptimizer_D\b": "it trains against a discriminator",
    r"\bUVit2DModel\b": (
        "it trains a model of image tokens by cross entropy (aMUSEd): there is no noise, and no squared error of it"
    ),
    r"\bDataCollatorForLanguageModeling\b": "it trains a language model; there is no denoiser",
    r"^\s*model = Autoencoder\w+\(": "it trains an autoencoder; there is no denoiser",
    r"\bneural_compressor\b": (
        "it trains the text encoder, and the denoiser stays as it is; or it quantizes and distils the denoiser by a "
        "library of its own"
    ),
    r"\bCosmos2_5_\w*Pipeline\b": (
        "its denoiser is given a timestep for each frame, and frames that are given are left out of its loss, so that "
        "videos with more of them would be taken for well known ones"
    ),
    r"accelerator\.prepare\(\s*(\w*controlnet\w*|\w*t2i_?adapter\w*|text_encoder\w*),\s*(text_encoder\w*,\s*)?optim": (
        "it trains a ControlNet, a T2I-Adapter or the text encoder alone, and the denoiser stays as it is: the guard "
        "keeps a denoiser from memorizing images, by its own weights or a LoRA of it"
    ),
}
"""Patterns of a script's source, and why a script with it cannot be guarded."""

REFUSED_FLAGS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "loss_type": (
        ("huber", "smooth_l1", "l1", "huber_scheduled"),
        "a sample's gradient then does not say how well it is known; use `--loss_type l2`",
    ),
    "use_lpl": (
        (True,),
        "it adds a loss on the features of the VAE, by which samples would be judged, too; leave it out",
    ),
}
"""Flags of scripts, their values, and why a script cannot be guarded under them."""


SKIPS_BATCHES = re.compile(r"\bstep < resume_step\b")
WEIGHT_FILES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".safetensors"})


class ScriptError(UserError):
    """A script, or a flag of it, that cannot be run under the guard."""


def check_script(command: Command) -> None:
    """Refuse what can be told before the script runs.

    Raises:
        UserError: says why.
    """
    check_environment(command.guard.num_shards)
    check_source(command.script.read_text(encoding="utf-8"), command.script.name)


def check_environment(num_shards: int | str) -> None:
    """Refuse several processes for several shards, and what spreads a model over processes.

    Args:
        num_shards: as the user wants them.

    Raises:
        ScriptError: names it.
    """
    world_size = launched_processes()
    if world_size > 1 and num_shards not in ("auto", 1):
        raise ScriptError(
            f"{world_size} processes were launched, and the proxies of {num_shards} shards take turns in one: start "
            "the script with `accelerate launch --num_processes 1`, or give the guard `--num_shards 1`"
        )
    name = configured_spreading()
    if name is not None:
        raise ScriptError(
            f"accelerate is configured for {name}, which spreads the weights that the guard exchanges between "
            "shards; run `accelerate config` without it"
        )


def check_source(source: str, name: str) -> None:
    """Refuse a script by its source, before it loads anything.

    Raises:
        LoopError: says why.
    """
    for pattern, reason in REFUSED_SOURCES.items():
        if re.search(pattern, source, re.MULTILINE):
            raise LoopError(f"{name} cannot be guarded: {reason}")


def check_flags(arguments: Any) -> None:
    """Refuse flags of a script, by what it has parsed.

    Raises:
        LoopError: names the flag, and says why and what to do.
    """
    for flag, (values, reason) in REFUSED_FLAGS.items():
        value = getattr(arguments, flag, None)
        if value is not None and value in values:
            shown = f"--{flag}" if value is True else f"--{flag} {value}"
            raise LoopError(f"`{shown}` cannot be used under the guard: {reason}")


def caches_by_step(source: str, arguments: Any) -> bool:
    """Return whether a script pairs what it has cached with its batches by their position, not by their samples."""
    return bool(re.search(r"\b\w+_cache\[step\]", source)) and bool(getattr(arguments, "cache_latents", False))


def check_resume(source: str, arguments: Any, num_shards: int) -> None:
    """Refuse to resume several shards in a script that goes through the batches it has trained before.

    Raises:
        ScriptError: says what to do.
    """
    if num_shards > 1 and getattr(arguments, "resume_from_checkpoint", None) and SKIPS_BATCHES.search(source):
        raise ScriptError(
            f"`--resume_from_checkpoint` cannot be had with {num_shards} shards here: the script takes the batches of "
            "the epoch that it has trained before from its loader and drops them, which would be others of the shard "
            "in turn; begin again elsewhere, with `--num_shards 1` if it has to be resumed"
        )


def output_folder(arguments: Any) -> Path | None:
    """Return the folder that a script writes to; some scripts take the file of their weights as `--output_dir`."""
    name = getattr(arguments, "output_dir", None)
    if name is None:
        return None
    path = Path(name)
    return path.parent if path.suffix in WEIGHT_FILES else path


def total_steps(arguments: Any, dataloader: Any) -> int | None:
    """Return the number of optimizer steps that a script will take, as it computes it from its flags; None: unknown."""
    steps = getattr(arguments, "max_train_steps", None)
    if steps is not None:
        return int(steps)
    epochs = getattr(arguments, "num_train_epochs", getattr(arguments, "num_epochs", None))
    if epochs is None or dataloader is None:
        return None
    accumulation = getattr(arguments, "gradient_accumulation_steps", 1)
    return int(epochs) * math.ceil(len(dataloader) / accumulation)
