"""The adapter of a UNet: added with peft, merged for export, and made into the factors of a LoRA file by SVD."""

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.lokr.layer import factorization
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm

from sd_memguard.config import Adapter
from sd_memguard.core.seeding import derive_seed
from sd_memguard.errors import UserError
from sd_memguard.proxies.lora import Change
from sd_memguard.proxies.low_rank import best_factors

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
"""The projections of the attention layers, as in diffusers' LoRA script."""
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
MAGNITUDE = ".lora_magnitude_vector"
"""What peft calls the part of DoRA that scales each row of a weight."""
KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
PART = re.compile(r"\.(lora_[AB]\.weight|(?:hada|lokr)_\w+)$")
"""What follows the name of a layer in that of a factor."""


class LoraError(UserError):
    """No LoRA file can be made of this change of the weights."""


class LowRank(NamedTuple):
    """What a LoRA file holds.

    Attributes:
        factors: by peft's names, (rank, in) and (out, rank), with the kernel of a convolution behind the first.
        rank: of all of them.
        relative_error: Frobenius norm of what they miss, over that of the change of all weights.
        inexpressible: the same of the biases and norms alone, which no rank can mend.
        magnitudes: of DoRA, (out,) by layer.
    """

    factors: dict[str, Tensor]
    rank: int
    relative_error: float
    inexpressible: float
    magnitudes: Mapping[str, Tensor] = MappingProxyType({})


def add_adapter(
    unet: UNet2DConditionModel, rank: int, seed: int, dtype: torch.dtype, kind: Adapter | None = "lora"
) -> dict[str, nn.Module]:
    """Freeze the UNet in ``dtype``, add a float32 adapter (alpha = rank), and return the adapted layers by name.

    It changes nothing at first, and its factors are initialized from an address of their own: those of LoRA and DoRA as
    in diffusers' script (gaussian down, zero up), the others as peft does.
    """
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        unet.add_adapter(_peft_config(kind, rank))
    # Not the adapter: DoRA's magnitudes are the norms of the weights, and rounded they would change the model.
    for parameter in unet.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return {name: module for name, module in unet.named_modules() if hasattr(module, "base_layer")}


def _peft_config(kind: Adapter | None, rank: int) -> PeftConfig:
    if kind == "loha":
        return LoHaConfig(r=rank, alpha=rank, target_modules=TARGETS)
    if kind == "lokr":
        return LoKrConfig(r=rank, alpha=rank, target_modules=TARGETS)
    return LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS, use_dora=kind == "dora"
    )


def adapter_size(kind: Adapter | None, rank: int, shape: Sequence[int]) -> int:
    """Return the number of parameters of an adapter on a layer whose weight is (out, in)."""
    rows, columns = shape
    if kind == "lokr":
        (row_factor, rows), (column_factor, columns) = factorization(rows), factorization(columns)
        # Peft keeps the second factor whole where two of the rank would not be smaller.
        second = rows * columns if rank >= max(rows, columns) / 2 else rank * (rows + columns)
        return row_factor * column_factor + second
    factors = rank * (rows + columns)
    return {"lora": factors, "dora": factors + rows, "loha": 2 * factors}[kind or "lora"]


def merge_adapter(
    unet: UNet2DConditionModel, parameters: Mapping[str, Tensor], rank: int, kind: Adapter | None
) -> UNet2DConditionModel:
    """Merge an adapter of any kind into a plain UNet as it was before training, by peft's own code, and return it.

    Args:
        unet: in float32 on the CPU.
        parameters: the adapter's, by the names that ``add_adapter`` has given them.
        rank: of the adapter.
        kind: of the adapter.
    """
    layers = add_adapter(unet, rank, 0, torch.float32, kind)
    with torch.no_grad():
        for name, parameter in parameters.items():
            unet.get_parameter(name).copy_(parameter)
        for layer in layers.values():
            assert isinstance(layer, BaseTunerLayer)
            layer.merge()
    unet.unload_lora()
    return unet


def whole_adapter(parameters: Mapping[str, Tensor], rank: int, dtype: torch.dtype) -> LowRank:
    """Return what a LoRA file holds of an adapter as it was trained, which it misses nothing of."""
    factors, magnitudes = {}, {}
    for name, tensor in parameters.items():
        layer, _, part = name.partition(MAGNITUDE)
        if part:
            magnitudes[layer] = tensor.to(dtype)
        else:
            factors[name.replace(".default", "")] = tensor.to(dtype)
    return LowRank(factors, rank, 0.0, 0.0, magnitudes)


def merge(unet: UNet2DConditionModel, changes: Mapping[str, Change]) -> UNet2DConditionModel:
    """Add changes to the weights of layers of a plain UNet as it was before training, and return it."""
    with torch.no_grad():
        for layer, change in changes.items():
            weight = unet.get_parameter(f"{layer}.weight")
            weight.copy_(weight.double() + change.up @ change.down)
    return unet


def low_rank(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    rank: int | None = None,
    error: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> LowRank:
    """Return the factors of one rank for all layers that miss least of the change of the weights (Eckart-Young).

    Changed biases and norms have no factors: they are missed whole, and counted as such. A layer with fewer singular
    values than the rank gets zeros for the rest, since programs differ in what they make of several ranks.

    Args:
        before: all weights of the UNet before training, by name.
        after: the same after it.
        rank: of the factors; alpha equals it. Where None:
        error: the largest relative error; the smallest rank that keeps it is taken.
        dtype: of the factors.

    Raises:
        LoraError: nothing has changed, or no rank keeps the error.
    """
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    layers = [name for name in changed if name.endswith(".weight") and after[name].ndim in (2, 4)]
    if not layers:
        raise LoraError("training has changed no layer of the UNet, so there is nothing to write into a LoRA file")
    lost = sum(float(_change(before, after, name).square().sum()) for name in set(changed) - set(layers))
    if rank is None:
        assert error is not None
        spectra = [singular_squares(_change(before, after, name)) for name in _shown(layers, "choosing the rank")]
        rank = smallest_rank(spectra, lost, error, rounding=torch.finfo(dtype).eps)
    factors, missed, total = {}, lost, lost
    for name in _shown(layers, "factoring layers"):
        change, layer = _change(before, after, name), name.removesuffix(".weight")
        down, up = (factor.to(dtype) for factor in best_factors(change, rank))
        missed += float((change - up.double() @ down.double()).square().sum())
        total += float(change.square().sum())
        kernel = after[name].shape[2:]
        factors[f"{layer}{DOWN}"] = down.unflatten(1, (-1, *kernel)).cpu().contiguous()
        factors[f"{layer}{UP}"] = up.reshape(*up.shape, *(1 for _ in kernel)).cpu().contiguous()
    return LowRank(factors, rank, (missed / total) ** 0.5, (lost / total) ** 0.5)


def _shown(layers: list[str], task: str) -> Iterable[str]:
    """Return the layers with a progress bar on a terminal: there are hundreds, and large ones take seconds."""
    return tqdm(layers, task, unit="layer", leave=False, disable=None)


def _change(before: Mapping[str, Tensor], after: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the change of a weight in float64, flat from its second dimension on, where it is quick to factor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    old, new = (weights[name].to(device, torch.float64) for weights in (before, after))
    return (new - old).flatten(1) if new.ndim > 1 else new - old


def singular_squares(matrix: Tensor) -> Tensor:
    """Return the squares of the singular values of a matrix in float64, largest first."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(short @ short.T).clamp_min(0).flip(0)


def smallest_rank(spectra: Sequence[Tensor], lost: float, error: float, rounding: float = 0.0) -> int:
    """Return the smallest rank at which factors of all layers miss at most ``error`` of the change.

    Args:
        spectra: squares of the singular values of each layer, largest first.
        lost: squares of the change that has no factors.
        error: relative to the Frobenius norm of the whole change.
        rounding: part of the error to leave to the rounding of the factors.

    Raises:
        LoraError: no rank does.
    """
    captured = torch.zeros(max((len(spectrum) for spectrum in spectra), default=0), dtype=torch.float64)
    for spectrum in spectra:
        captured[: len(spectrum)] += spectrum.cpu()
    total = float(captured.sum()) + lost
    missed = captured.sum() - captured.cumsum(0) + lost
    enough = torch.nonzero(missed <= total * (error**2 - rounding**2)).flatten()
    if len(enough) == 0 or error <= rounding:
        reasons = f"biases and norms, which have no factors, are {(lost / total) ** 0.5:.2%} of the change"
        if rounding > 1e-5:
            reasons += f", and the rounding to this `--dtype` takes up to {rounding:.1%}"
        raise LoraError(
            f"`--lora_error` {error:g} cannot be kept by any rank: {reasons}; raise it, or export `merged` or "
            "`single-file`, which miss nothing"
        )
    return int(enough[0]) + 1


def diffusers_names(adapter: LowRank) -> dict[str, Tensor]:
    """Return the content of ``pytorch_lora_weights.safetensors``, as ``load_lora_weights`` of a pipeline reads it."""
    magnitudes = {f"{layer}{MAGNITUDE}": tensor for layer, tensor in adapter.magnitudes.items()}
    return {f"unet.{name}": tensor for name, tensor in {**adapter.factors, **magnitudes}.items()}


def layers_of(adapter: LowRank) -> list[str]:
    """Return the layers that an adapter is on."""
    return list(dict.fromkeys(PART.sub("", name) for name in adapter.factors))


def kohya_layer(name: str) -> str:
    """Return what kohya's scripts call a layer of the UNet."""
    return "lora_unet_" + name.replace(".", "_")


def kohya_names(adapter: LowRank, layers: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Return the same in the form of kohya's scripts, with the alpha of each layer; other kinds as LyCORIS names them.

    Args:
        adapter: the factors.
        layers: what layers are called there, by their names here; the same by default.
    """
    own = {layer: kohya_layer(layer if layers is None else layers[layer]) for layer in layers_of(adapter)}
    weights = {}
    for name, tensor in adapter.factors.items():
        layer, part = PART.split(name)[:2]
        weights[f"{own[layer]}.{KOHYA.get(part, part)}"] = tensor
        weights[f"{own[layer]}.alpha"] = torch.tensor(float(adapter.rank), dtype=tensor.dtype)
    return weights | {f"{own[layer]}.dora_scale": scale[:, None] for layer, scale in adapter.magnitudes.items()}


def lycoris_weight(weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """Return the weight of a layer under an adapter in LyCORIS' form, by its formulas.

    Args:
        weight: (out, in), before training.
        own: what the file holds of the layer, by LyCORIS' names.

    >>> own = {"lora_up.weight": torch.ones(2, 1), "lora_down.weight": torch.ones(1, 2), "alpha": torch.tensor(3.0)}
    >>> lycoris_weight(torch.zeros(2, 2), own)
    tensor([[3., 3.],
            [3., 3.]])
    """
    alpha = own["alpha"]
    if "hada_w1_a" in own:
        first, second = (own[f"hada_w{part}_a"] @ own[f"hada_w{part}_b"] for part in "12")
        return weight + alpha / own["hada_w1_b"].shape[0] * first * second
    if "lokr_w1" in own:
        if (second_factor := own.get("lokr_w2")) is not None:  # of whole factors the alpha is that of their size
            return weight + torch.kron(own["lokr_w1"], second_factor)
        down = own["lokr_w2_b"]
        return weight + alpha / down.shape[0] * torch.kron(own["lokr_w1"], own["lokr_w2_a"] @ down)
    down = own["lora_down.weight"]
    changed = weight + alpha / down.shape[0] * own["lora_up.weight"] @ down
    scale = own.get("dora_scale")
    return changed if scale is None else scale * changed / changed.norm(dim=1, keepdim=True)
