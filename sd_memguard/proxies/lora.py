"""LoRA proxies: one adapter whose factors are swapped on one base, averaged without error.

The mean of the proxies is ``W + s mean(B_k A_k)``, and ``mean(B_k A_k)`` is not ``mean(B_k) mean(A_k)``. So the factors
become their means, and what is missing, ``s (mean(B_k A_k) - mean(B_k) mean(A_k))``, is added to the base weights
(FedEx-LoRA, https://arxiv.org/abs/2410.09432). The base has a float32 master copy, so that nothing is lost under bf16.

Several processes exchange the factors, which are small, and each does the sums of all proxies: the products would be as
large as the base, and the result is to the bit that of one process.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sd_memguard.core.aggregation import aggregate
from sd_memguard.distributed import ProcessGroup
from sd_memguard.proxies.full import WEIGHTS, FullProxies
from sd_memguard.proxies.store import ProxyStore
from sd_memguard.proxies.swap import copy_tensors

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
BASE_FILE = "base.safetensors"


class LoraProxies(FullProxies):
    """K LoRA adapters on one base, of which one is active.

    Args:
        parameters: the factors of the active adapter, named ``<layer>.lora_A.default.weight`` (rank, in) and
            ``<layer>.lora_B.default.weight`` (out, rank) as peft does.
        optimizer: the plain torch optimizer over them.
        num_shards: number of proxies.
        store: where the offloaded ones wait.
        base: the weight of each adapted layer in the active model, (out, in), in whatever precision.
        master: the same weights in float32 on the CPU; changed here by every averaging.
        scaling: the factor ``s`` of the adapter, alpha / rank.
        exchange: the processes that share the proxies; by default there is one.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        optimizer: Optimizer,
        num_shards: int,
        store: ProxyStore,
        base: Mapping[str, Tensor],
        master: Mapping[str, Tensor],
        scaling: float,
        exchange: ProcessGroup | None = None,
    ) -> None:
        super().__init__(parameters, optimizer, num_shards, store, exchange=exchange)
        self.base, self.master, self.scaling = dict(base), dict(master), scaling

    def average(self, weights: Sequence[float]) -> list[float]:
        """Average the proxies exactly: factors become their means, the rest goes into the base.

        Returns:
            The Frobenius distance of each proxy's merged weights from the aggregate before they were replaced.
        """
        if self.num_shards == 1:
            return [0.0]
        factors = self._all_factors()
        distances = self._distances(factors, weights)
        mean = aggregate(factors, weights)
        for layer, residual in self._residuals(factors, weights, mean):
            self.master[layer] = (self.master[layer].double() + residual).float()
        copy_tensors(self.master, self.base)
        self._share(WEIGHTS, mean)
        self._load(WEIGHTS, mean)
        return distances

    def distances(self, weights: Sequence[float]) -> list[float]:
        """Return the Frobenius distance of each proxy's merged weights from their mean, changing nothing."""
        return self._distances(self._all_factors(), weights)

    def _distances(self, factors: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> list[float]:
        squares = [0.0] * self.num_shards
        for layer in sorted(self.master):  # a sum depends on its order, and a resumed run must give the same
            products = [self._product(state, layer) for state in factors]
            mean = _weighted_mean(products, weights)
            for k, product in enumerate(products):
                squares[k] += float((product - mean).square().sum()) * self.scaling**2
        return [square**0.5 for square in squares]

    @contextmanager
    def averaged(self, weights: Sequence[float]) -> Iterator[None]:
        """Put the mean of the merged proxies in the active model for a while (of the main process)."""
        if self.num_shards == 1:
            yield
            return
        factors = self._all_factors()
        if not self.exchange.is_main:
            yield
            return
        own = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.parameters.items()}
        mean = aggregate(factors, weights)
        try:
            # The base first: the residuals need the active factors as they are.
            for layer, residual in self._residuals(factors, weights, mean):
                copy_tensors({layer: (self.master[layer].double() + residual).float()}, {layer: self.base[layer]})
            copy_tensors(mean, self.parameters)
            yield
        finally:
            copy_tensors(own, self.parameters)
            copy_tensors(self.master, self.base)

    def merged(self, weights: Sequence[float]) -> dict[str, Tensor]:
        """Return the mean of the merged weights of each adapted layer, (out, in) float32 on the CPU.

        With several processes the main one gets it, the others nothing.
        """
        factors, merged = self._all_factors(), {}
        if not self.exchange.is_main:
            return {}
        for layer, weight in self.master.items():
            products = [self._product(state, layer) for state in factors]
            merged[layer] = (weight.double() + self.scaling * _weighted_mean(products, weights)).float()
        return merged

    def save(self, folder: Path) -> dict[str, Any]:
        """Write all proxies and the base as the averagings have left it, see the full-weight proxies."""
        if self.exchange.is_main:
            save_file(self.master, folder / BASE_FILE)
        return super().save(folder)

    def load(self, folder: Path, index: Mapping[str, Any]) -> None:
        """Take over all proxies and the base from a folder written by ``save``."""
        super().load(folder, index)
        self.master = {layer: weight.clone() for layer, weight in load_file(folder / BASE_FILE).items()}
        copy_tensors(self.master, self.base)

    def _all_factors(self) -> list[Mapping[str, Tensor]]:
        """Return the factors of each proxy, also of those of other processes."""
        if self.exchange.size == 1 or self.num_shards == 1:
            return self._states(WEIGHTS)
        own = dict(zip(self.own, self._states(WEIGHTS), strict=True))
        factors: list[Mapping[str, Tensor]] = []
        for shard_index in range(self.num_shards):
            flat = torch.zeros(sum(parameter.numel() for parameter in self.parameters.values()))
            if shard_index in own:
                flat = torch.cat([own[shard_index][name].detach().cpu().flatten() for name in self.parameters])
            owner = shard_index % self.exchange.size
            factors.append(self._unflatten(self.exchange.broadcast(owner, flat, "factors")))
        return factors

    def _unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split([parameter.numel() for parameter in self.parameters.values()])
        return {name: piece.view_as(p) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)}

    def _residuals(
        self, factors: Sequence[Mapping[str, Tensor]], weights: Sequence[float], mean: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield ``s (mean(B_k A_k) - B A)`` of each layer in float64, for the mean factors A and B."""
        for layer in self.master:
            products = [self._product(state, layer) for state in factors]
            yield layer, self.scaling * (_weighted_mean(products, weights) - self._product(mean, layer))

    def _product(self, factors: Mapping[str, Tensor], layer: str) -> Tensor:
        up, down = (factors[layer + suffix].detach().cpu().double() for suffix in (UP, DOWN))
        return up @ down


def _weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return torch.einsum("k,k...->...", shares, torch.stack(list(tensors)))
