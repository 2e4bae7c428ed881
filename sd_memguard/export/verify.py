"""What was exported, loaded again as its users will load it: are the weights right, does it generate the same?"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging
from safetensors.torch import load_file
from torch import Tensor

from sd_memguard.models.kinds import KINDS, StableDiffusion
from sd_memguard.models.lora import DOWN, UP, LowRank, kohya_layer, lycoris_weight
from sd_memguard.models.pipeline import kind_of

PROMPT = "a red apple on a white table"
NUM_INFERENCE_STEPS = 4
ROUNDING = 1e-5
"""Relative difference of weights that were multiplied in another order in float32."""


def load_folder(folder: Path, variant: str | None = None, **parts: Any) -> Any:
    """Return the pipeline of a diffusers folder in float32 on the CPU; asks no hub.

    Without what alters images: a safety checker blackens them, and a black one would be like any other.
    """
    kind = kind_of(folder)
    with quiet():
        pipeline = kind.pipeline.from_pretrained(
            str(folder), variant=variant, use_safetensors=True, local_files_only=True, **_plain(kind), **parts
        )
        return pipeline.to(torch.float32)


def load_single_file(file: Path, configs: Path) -> Any:
    """Return the pipeline of a one-file checkpoint in float32 on the CPU, built by the configs of a folder."""
    kind = kind_of(configs)
    with quiet():
        pipeline = kind.pipeline.from_single_file(str(file), config=str(configs), local_files_only=True, **_plain(kind))
        return pipeline.to(torch.float32)


def _plain(kind: StableDiffusion) -> dict[str, Any]:
    return {**kind.loading, "feature_extractor": None}


def load_lora(pipeline: Any, file: Path) -> None:
    """Load a LoRA file on top of a pipeline."""
    with quiet():
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)


def load_lycoris(pipeline: Any, file: Path, layers: Mapping[str, str]) -> None:
    """Change the UNet of a pipeline by a file in LyCORIS' form, which diffusers does not read.

    Args:
        pipeline: with the UNet before training.
        file: of the adapter.
        layers: what layers are called there, by their names here.

    Raises:
        ValueError: the file holds something else besides.
    """
    found = load_file(file)
    for layer, name in layers.items():
        prefix = f"{kohya_layer(name)}."
        own = {key.removeprefix(prefix): found.pop(key).double() for key in list(found) if key.startswith(prefix)}
        parameter = pipeline.unet.get_parameter(f"{layer}.weight")
        parameter.data = lycoris_weight(parameter.data.double(), own).to(parameter.dtype)
    if found:
        raise ValueError(f"{next(iter(found))} belongs to no layer")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and notices off the terminal."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@torch.no_grad()
def generate(pipeline: Any) -> Tensor:
    """Return an image (3, H, W) at the pipeline's own size for a fixed prompt and seed: 4 DDIM steps, guidance 7.5.

    Its values go from 0 to 1, a little beyond where an image file would be cut off.
    """
    with quiet():
        # Some configs do not mention clip_sample; DDIM would then clip the latents to [-1, 1].
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        pipeline.set_progress_bar_config(disable=True)
        latents = pipeline(
            PROMPT,
            num_inference_steps=NUM_INFERENCE_STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return decoded[0] / 2 + 0.5


def difference(generated_image: Tensor, reference: Tensor) -> float:
    """Return the root mean square of the difference, relative to the standard deviation of the reference.

    NaN where either is not finite.
    """
    return float((generated_image - reference).square().mean().sqrt() / reference.std())


def fingerprints(pipeline: Any, dtype: torch.dtype | None) -> dict[str, str]:
    """Return a hash of the weights of each network as they are in a precision, in float32 where None."""
    networks = KINDS[type(pipeline).__name__].networks
    return {part: _fingerprint(getattr(pipeline, part), dtype or torch.float32) for part in networks}


def _fingerprint(network: torch.nn.Module, dtype: torch.dtype) -> str:
    digest = hashlib.blake2b()
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.to(dtype) if tensor.is_floating_point() else tensor
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(values.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def wrong_layers(unet: UNet2DConditionModel, adapter: LowRank) -> list[str]:
    """Return the layers whose weights a loaded LoRA file does not change as its factors say."""
    meant = {name.removesuffix(DOWN) for name in adapter.factors if name.endswith(DOWN)}
    adapted = {name: module for name, module in unet.named_modules() if hasattr(module, "get_delta_weight")}
    return sorted(
        layer
        for layer in meant | adapted.keys()
        if layer not in adapted or layer not in meant or not _changes_as_meant(adapted[layer], adapter, layer)
    )


def wrong_weights(
    unet: UNet2DConditionModel, trained: UNet2DConditionModel, layers: Iterable[str], dtype: torch.dtype
) -> list[str]:
    """Return the layers whose weights differ from the trained ones by more than the rounding of an adapter."""
    rounding = ROUNDING + 2 * (torch.finfo(dtype).eps if dtype != torch.float32 else 0.0)
    wrong = []
    for layer in layers:
        found, meant = (network.get_parameter(f"{layer}.weight").detach() for network in (unet, trained))
        if not (found - meant).norm() <= rounding * meant.norm():
            wrong.append(layer)
    return wrong


def _changes_as_meant(module: Any, adapter: LowRank, layer: str) -> bool:
    down, up = (adapter.factors[layer + suffix].float().flatten(1) for suffix in (DOWN, UP))
    (name,) = module.active_adapters
    meant, change = up @ down, module.get_delta_weight(name).detach().flatten(1)
    if adapter.magnitudes:
        magnitudes = module.lora_magnitude_vector[name].weight.detach()
        if not torch.equal(magnitudes, adapter.magnitudes[layer].to(magnitudes.dtype)):
            return False
    return bool((change - meant).norm() <= ROUNDING * meant.norm())
