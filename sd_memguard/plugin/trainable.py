"""What a loop trains: found by its optimizer, named by its models, and made into proxies."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from sd_memguard.errors import LoopError
from sd_memguard.proxies.full import FullProxies
from sd_memguard.proxies.lora import DOWN, UP, LoraProxies
from sd_memguard.proxies.store import DiskStore, ProxyStore, RamStore

FACTOR_LIKE = re.compile(r"(^|[._])(lora|hada|lokr|oft|boft|vera|ia3|dora)_")
"""In names of adapters' parameters, peft's and others'."""
FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its peft layers by name.

    Attributes:
        name: peft's name of the adapter.
        layers: the peft layer of each adapted layer.
        scaling: alpha / rank.
        configs: peft's config of the adapter in each model that has one, which is saved and loaded with it.
    """

    name: str
    layers: dict[str, Any]
    scaling: float
    configs: tuple[Any, ...] = ()

    def factors(self, layer: str) -> tuple[Any, Any]:
        """Return the two linear maps of a layer's adapter, down and up."""
        return self.layers[layer].lora_A[self.name], self.layers[layer].lora_B[self.name]

    @property
    def rank(self) -> int:
        """The largest rank among the layers."""
        return max(int(self.factors(layer)[0].weight.shape[0]) for layer in self.layers)


def trained_parameters(optimizer: Optimizer, models: Sequence[nn.Module]) -> dict[str, Parameter]:
    """Return what the optimizer trains by name, in the order of the models' parameters.

    Raises:
        LoopError: the optimizer trains something that is in none of the models.
    """
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = {}
    for index, model in enumerate(models):
        prefix = f"model{index}." if index else ""
        for name, parameter in model.named_parameters():
            if id(parameter) in wanted:
                found[prefix + name.replace("_orig_mod.", "")] = parameter
    if len(found) < len(wanted):
        raise LoopError(
            f"the optimizer trains {len(wanted)} parameters, of which {len(wanted) - len(found)} are not in the UNet; "
            "with several shards the guard has to exchange all of them: give the models they belong to as "
            "`models=[text_encoder]`, or set `num_shards=1`"
        )
    return found


def find_adapter(parameters: Mapping[str, Parameter], models: Sequence[nn.Module]) -> Adapter | None:
    """Return the LoRA adapter that is trained, None where weights themselves are.

    Raises:
        LoopError: it is of a kind whose mean the guard cannot take exactly.
    """
    matches = [match for match in map(FACTOR.fullmatch, parameters) if match]
    unknown = [name for name in parameters if FACTOR_LIKE.search(name) and not FACTOR.fullmatch(name)]
    if unknown:
        raise LoopError(
            f"the adapter has parameters such as {unknown[0]!r}; of peft's adapters the guard averages plain LoRA on "
            "linear layers alone, and the mean of other factors is not that of what they make: use plain LoRA, "
            "or `num_shards=1`"
        )
    if not matches:
        return None
    names = {match["adapter"] for match in matches}
    if len(names) > 1:
        raise LoopError(f"the optimizer trains several adapters ({', '.join(sorted(names))}); train one")
    name = names.pop()
    layers = {match["layer"]: _module(match["layer"], models) for match in matches}
    for layer, module in layers.items():
        if module.base_layer.weight.dim() != 2 or not hasattr(module.base_layer, "in_features"):
            raise LoopError(
                f"the adapter covers {layer!r}, which is no linear layer; choose `target_modules` among the "
                "projections of the attention layers, e.g. to_k, to_q, to_v, to_out.0"
            )
    scalings = {module.scaling[name] for module in layers.values()}
    if len(scalings) > 1:
        raise LoopError(f"the adapter's alpha / rank differs between layers ({sorted(scalings)}); use one for all")
    configs = [getattr(getattr(model, "_orig_mod", model), "peft_config", {}).get(name) for model in models]
    known = tuple(config for config in configs if config)
    return Adapter(name, layers, float(scalings.pop()), configs=known)


def make_proxies(
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
    num_shards: int,
    adapter: Adapter | None,
    ema: Any,
    store_dir: str | Path | None,
) -> FullProxies:
    """Return the proxies of a loop; they rest in memory, or in files where a folder is given."""
    store: ProxyStore = RamStore() if store_dir is None else DiskStore(Path(store_dir))
    if adapter is None:
        return FullProxies(parameters, optimizer, num_shards, store, ema)
    named = {_common_name(name): parameter for name, parameter in parameters.items()}
    return LoraProxies(named, optimizer, num_shards, store, adapter.layers, adapter.scaling)


def _common_name(name: str) -> str:
    """Return a factor's name with `default` for its adapter, as the proxies know it."""
    match = FACTOR.fullmatch(name)
    return name if match is None else match["layer"] + (DOWN if match["side"] == "A" else UP)


def _module(layer: str, models: Sequence[nn.Module]) -> Any:
    """Return the peft layer of this name, which begins with the number of its model where that is not the first."""
    match = re.fullmatch(r"model(\d+)\.(.+)", layer)
    model, name = (models[int(match[1])], match[2]) if match else (models[0], layer)
    return getattr(model, "_orig_mod", model).get_submodule(name)
