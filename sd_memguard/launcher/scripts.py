"""What the launcher has to know of a script: the processes it runs in, its length, how it caches."""

import math
import os
import re
from typing import Any

from sd_memguard.errors import UserError


class ScriptError(UserError):
    """A script, or a flag of it, that cannot be run under the guard."""


def check_environment(num_shards: int | str) -> None:
    """Refuse several processes for several shards, and what spreads a model over processes.

    Args:
        num_shards: as the user wants them.

    Raises:
        ScriptError: names it.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and num_shards not in ("auto", 1):
        raise ScriptError(
            f"{world_size} processes were launched, and the proxies of {num_shards} shards take turns in one: start "
            "the script with `accelerate launch --num_processes 1`, or give the guard `--num_shards 1`"
        )
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ScriptError(
                f"accelerate is configured for {name}, which spreads the weights that the guard exchanges between "
                "shards; run `accelerate config` without it"
            )


def caches_by_step(source: str, arguments: Any) -> bool:
    """Return whether a script pairs what it has cached with its batches by their position, not by their samples."""
    return bool(re.search(r"\b\w+_cache\[step\]", source)) and bool(getattr(arguments, "cache_latents", False))


def total_steps(arguments: Any, dataloader: Any) -> int | None:
    """Return the number of optimizer steps that a script will take, as it computes it from its flags; None: unknown."""
    steps = getattr(arguments, "max_train_steps", None)
    if steps is not None:
        return int(steps)
    epochs = getattr(arguments, "num_train_epochs", None)
    if epochs is None or dataloader is None:
        return None
    accumulation = getattr(arguments, "gradient_accumulation_steps", 1)
    return int(epochs) * math.ceil(len(dataloader) / accumulation)
