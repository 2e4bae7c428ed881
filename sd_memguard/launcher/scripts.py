"""Which scripts can be run under the guard, and why others cannot: said before a model is loaded."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sd_memguard.errors import UserError

TESTED = (
    "train_text_to_image.py",
    "train_text_to_image_lora.py",
    "train_text_to_image_sdxl.py",
    "train_text_to_image_lora_sdxl.py",
    "train_dreambooth.py",
    "train_dreambooth_lora.py",
    "train_dreambooth_lora_sdxl.py",
)
NEEDED = {
    "UNet2DConditionModel": "a Stable Diffusion 1.x, 2.x or SDXL UNet",
    "Accelerator": "accelerate",
    "mse_loss": "torch's mse_loss",
}
OWN_LOOP = "`MemorizationGuard.prepare` in a loop of your own can do it, see docs/plugin.md"


class ScriptError(UserError):
    """A script, or a flag of it, that cannot be run under the guard."""


class Refusal(NamedTuple):
    """A flag of a script that is refused: when, why, and what to do instead."""

    holds: Any
    reason: str


REFUSED: Mapping[str, Refusal] = {
    "do_edm_style_training": Refusal(
        True, "its EDM loss does not go through mse_loss, so that there is no loss per sample to judge; leave it out"
    ),
    "cache_latents": Refusal(
        True, "the script pairs cached latents with batches by their position, which sharding changes; leave it out"
    ),
    "use_dora": Refusal(True, "the mean of DoRA adapters is not a DoRA adapter; leave it out for plain LoRA"),
    "prediction_type": Refusal(
        "sample", "the script subtracts the noise from the UNet's output before the loss; use epsilon or v_prediction"
    ),
    "train_text_encoder_ti": Refusal(True, "the embeddings it trains are in no model that is prepared; leave it out"),
}


def check_environment() -> None:
    """Refuse several processes and what spreads a model over them.

    Raises:
        ScriptError: names it.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ScriptError(
            f"{world_size} processes were launched, and a script runs under the guard in one: start it with "
            "`accelerate launch --num_processes 1`"
        )
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ScriptError(
                f"accelerate is configured for {name}, which spreads the weights that the guard exchanges between "
                "shards; run `accelerate config` without it"
            )


def check_source(script: Path) -> None:
    """Refuse a script that lacks what the guard takes hold of.

    Raises:
        ScriptError: says what is missing.
    """
    source = script.read_text(encoding="utf-8")
    transformers = sorted(set(re.findall(r"\b\w+Transformer\w*Model\b", source)))
    missing = [what for name, what in NEEDED.items() if not re.search(rf"\b{name}\b", source)]
    if transformers and "UNet2DConditionModel" not in source:
        raise ScriptError(
            f"{script.name} trains {transformers[0]}, whose losses do not come from a UNet by mse_loss; scripts for "
            f"Stable Diffusion 1.x, 2.x and SDXL can be run. {OWN_LOOP}"
        )
    if missing:
        raise ScriptError(
            f"{script.name} does not use {' nor '.join(missing)}, which the guard takes hold of. {OWN_LOOP}"
        )


def check_arguments(arguments: Any) -> None:
    """Refuse flags of the script under which the guard cannot work.

    Raises:
        ScriptError: names the flag, the reason, and the way out.
    """
    for name, refusal in REFUSED.items():
        value = getattr(arguments, name, None)
        if value == refusal.holds:
            flag = f"--{name}" if value is True else f"--{name} {value}"
            raise ScriptError(f"`{flag}` cannot be used under the guard: {refusal.reason}")


def total_steps(arguments: Any, dataloader: Any) -> int:
    """Return the number of optimizer steps that a script will take, as it computes it from its flags.

    Raises:
        ScriptError: its flags do not say.
    """
    steps = getattr(arguments, "max_train_steps", None)
    if steps is not None:
        return int(steps)
    epochs = getattr(arguments, "num_train_epochs", None)
    if epochs is None:
        raise ScriptError("the script has neither --max_train_steps nor --num_train_epochs to tell its length by")
    accumulation = getattr(arguments, "gradient_accumulation_steps", 1)
    return int(epochs) * math.ceil(len(dataloader) / accumulation)
