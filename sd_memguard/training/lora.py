"""The LoRA adapter of a UNet: added with peft, merged for export, and written as a LoRA file by SVD."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor

from sd_memguard.core.seeding import derive_seed

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
"""The projections of the attention layers, as in diffusers' LoRA script."""
FILE = "pytorch_lora_weights.safetensors"


class LowRank(NamedTuple):
    """A LoRA file's content: factors by peft's names, their rank, and what they miss of the change of the weights."""

    factors: dict[str, Tensor]
    rank: int
    relative_error: float


def add_adapter(unet: UNet2DConditionModel, rank: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Freeze the UNet in ``dtype``, add a float32 adapter (alpha = rank), and return the adapted weights in float32.

    The factors are drawn as in diffusers' script (gaussian down, zero up), from an address of their own.
    """
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        unet.add_adapter(config)
    master = {layer: weight.detach().float().cpu().clone() for layer, weight in base_weights(unet).items()}
    if dtype != torch.float32:
        unet.to(dtype)
    cast_training_params(unet, dtype=torch.float32)
    return master


def base_weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Return the weight under the adapter of each adapted layer, by layer name."""
    suffix = ".base_layer.weight"
    return {name.removesuffix(suffix): p for name, p in unet.named_parameters() if name.endswith(suffix)}


def merge(unet: UNet2DConditionModel, merged: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """Set the merged weights in a plain UNet as it was before training, and return it."""
    with torch.no_grad():
        for layer, weight in merged.items():
            unet.get_parameter(f"{layer}.weight").copy_(weight)
    return unet


def low_rank(original: UNet2DConditionModel, merged: Mapping[str, Tensor], rank: int) -> LowRank:
    """Return the best factors of a given rank for the change of each layer, by SVD.

    Args:
        original: the UNet before training.
        merged: the weights after it, by layer name.
        rank: largest rank of the factors; alpha equals it.
    """
    factors, missed, total = {}, 0.0, 0.0
    for layer, weight in merged.items():
        change = weight.double() - original.get_parameter(f"{layer}.weight").detach().cpu().double()
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        root = values[:rank].sqrt()
        factors[f"{layer}.lora_A.weight"] = (root[:, None] * right[:rank]).float().contiguous()
        factors[f"{layer}.lora_B.weight"] = (left[:, :rank] * root).float().contiguous()
        missed += float(values[rank:].square().sum())
        total += float(values.square().sum())
    return LowRank(factors, rank, (missed / total) ** 0.5 if total else 0.0)


def write_lora_file(folder: Path, adapter: LowRank) -> None:
    """Write ``pytorch_lora_weights.safetensors``, which ``load_lora_weights`` of a pipeline reads."""
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=adapter.factors, safe_serialization=True)
