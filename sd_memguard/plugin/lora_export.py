"""The aggregate of LoRA proxies as one adapter on the base as it was, which is all that a loop of others saves.

Averaging leaves part of the change in the base weights (see `sd_memguard.proxies.lora`). Here the whole change of each
layer is put in the adapter, by its best factors of a given rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from torch.nn import Parameter

from sd_memguard.plugin.trainable import Adapter
from sd_memguard.proxies.lora import LoraProxies
from sd_memguard.proxies.low_rank import best_factors
from sd_memguard.proxies.swap import copy_tensors


class Fit(NamedTuple):
    """How well an adapter carries the change: its rank, and the share of the change (Frobenius) that it misses."""

    rank: int
    relative_error: float


@contextmanager
def whole_adapter(
    proxies: LoraProxies, adapter: Adapter, weights: Sequence[float], rank: int | None = None
) -> Iterator[Fit]:
    """Give the model the original base and an adapter that carries the whole change, for as long as the block lasts.

    Args:
        proxies: the proxies to average.
        adapter: the adapter's layers in the active model.
        weights: weight of each proxy.
        rank: rank of the factors; by default the adapter's rank times the number of proxies. All layers have this one,
            those that need less with zeros for the rest: what is saved is loaded by the rank in the adapter's config.
    """
    wanted = rank or adapter.rank * proxies.num_shards
    own = {}
    missed, total = 0.0, 0.0
    restored = ExitStack()
    try:
        _set_rank(adapter, wanted, restored)
        for layer, merged in proxies.merged(weights).items():
            modules = adapter.factors(layer)
            own[layer] = [module.weight for module in modules]
            change = merged.double() - adapter.original[layer].double()
            device = own[layer][0].device
            # Apple's GPUs know no float64.
            change = change.to("cpu" if device.type == "mps" else device)
            down, up = best_factors(change / adapter.scaling, wanted)
            for module, factor, weight in zip(modules, (down, up), own[layer], strict=True):
                module.weight = Parameter(factor.to(weight).contiguous(), requires_grad=weight.requires_grad)
            missed += float((change - adapter.scaling * up @ down).square().sum())
            total += float(change.square().sum())
        copy_tensors(adapter.original, proxies.base)
        yield Fit(wanted, (missed / total) ** 0.5 if total else 0.0)
    finally:
        for layer, weights_of_layer in own.items():
            for module, weight in zip(adapter.factors(layer), weights_of_layer, strict=True):
                module.weight = weight
        copy_tensors(proxies.master, proxies.base)
        restored.close()


def _set_rank(adapter: Adapter, rank: int, restored: ExitStack) -> None:
    """Tell peft's configs and layers of another rank of the same scaling, until ``restored`` is closed."""
    alpha = adapter.scaling * rank
    for config in adapter.configs:
        for name, value in (("r", rank), ("lora_alpha", alpha), ("rank_pattern", {}), ("alpha_pattern", {})):
            restored.callback(setattr, config, name, getattr(config, name))
            setattr(config, name, value)
    for module in adapter.layers.values():
        for values, value in ((module.r, rank), (module.lora_alpha, alpha)):
            restored.callback(values.__setitem__, adapter.name, values[adapter.name])
            values[adapter.name] = value
