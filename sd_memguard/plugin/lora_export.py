"""The aggregate of LoRA proxies as one adapter on the base as it was, which is all that a loop of others saves.

Averaging leaves part of the change in a second adapter (see `sd_memguard.proxies.lora`). Here the whole change of each
layer is put in the first one, by its best factors of a given rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from sd_memguard.plugin.trainable import Adapter
from sd_memguard.proxies.lora import LoraProxies
from sd_memguard.proxies.low_rank import best_factors_of_product


class Fit(NamedTuple):
    """How well an adapter carries the change: its rank, and the share of the change (Frobenius) that it misses."""

    rank: int
    relative_error: float


@contextmanager
def whole_adapter(
    proxies: LoraProxies, adapter: Adapter, weights: Sequence[float], rank: int | None = None
) -> Iterator[Fit]:
    """Give the model an adapter that carries the whole change, and no second one, for as long as the block lasts.

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
        for layer, change in proxies.changes(weights).items():
            modules = adapter.factors(layer)
            own[layer] = [module.weight for module in modules]
            device = own[layer][0].device
            # Apple's GPUs know no float64.
            up, down = (part.to("cpu" if device.type == "mps" else device) for part in change)
            new_down, new_up = best_factors_of_product(up / adapter.scaling, down, wanted)
            for module, factor, weight in zip(modules, (new_down, new_up), own[layer], strict=True):
                module.weight = Parameter(factor.to(weight).contiguous(), requires_grad=weight.requires_grad)
            total += _square(up, down)
            missed += _square(torch.cat((up, -adapter.scaling * new_up), dim=1), torch.cat((down, new_down)))
        restored.enter_context(proxies.without_residuals())
        yield Fit(wanted, (missed / total) ** 0.5 if total else 0.0)
    finally:
        for layer, weights_of_layer in own.items():
            for module, weight in zip(adapter.factors(layer), weights_of_layer, strict=True):
                module.weight = weight
        restored.close()


def _square(up: Tensor, down: Tensor) -> float:
    """Return the squared Frobenius norm of ``up @ down``, without forming it."""
    _, left = torch.linalg.qr(up)
    _, right = torch.linalg.qr(down.T)
    return float((left @ right.T).square().sum())


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
