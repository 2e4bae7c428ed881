"""LoRA proxies: one adapter whose factors are swapped on one base, averaged without error.

The mean of the proxies is ``W + s mean(B_k A_k)``, and ``mean(B_k A_k)`` is not ``mean(B_k) mean(A_k)``. So the factors
become their means, and what is missing stays as a frozen second adapter: FedEx-LoRA (https://arxiv.org/abs/2410.09432)
adds it to the base, which would have to be kept in float32 for that. With B, A the weighted means and K any one proxy,

    sum of w_k B_k A_k - B A  =  sum of w_k (B_k - B) (A_k - A)  =  sum over j != K of w_j (B_j - B) (A_j - A_K)

since the weighted differences from the mean add up to zero. So each averaging adds (number of proxies - 1) x rank to
the rank of the second adapter. The base is neither copied nor changed.

Several processes exchange the factors, which are small, and each does the sums of all proxies: the result is to the bit
that of one process.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import linear
from torch.optim import Optimizer

from sd_memguard.core.aggregation import aggregate
from sd_memguard.distributed import ProcessGroup
from sd_memguard.proxies.full import WEIGHTS, FullProxies
from sd_memguard.proxies.store import ProxyStore
from sd_memguard.proxies.swap import copy_tensors, evaluated

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
RESIDUAL_FILE = "residual.safetensors"


class Change(NamedTuple):
    """A change of a layer's weight, ``up @ down``: (out, n) and (n, in) in float64 on the CPU."""

    up: Tensor
    down: Tensor


class FrozenAdapter:
    """A second adapter on a layer, which adds ``x -> maps[-1] ... maps[0] x`` to its output and is not trained.

    Args:
        layer: the layer under the trained adapter; called with the input as its first argument.

    Attributes:
        maps: (rank, in) and (out, rank); the matrix itself, (out, in), once that takes less memory; none at first.
        is_on: whether it adds anything.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.maps: tuple[Tensor, ...] = ()
        self.is_on = True
        # Before the model is compiled, which sees hooks at its first call.
        layer.register_forward_hook(self)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Add to the layer's output, in its precision, as peft adds its adapters."""
        if not self.maps or not self.is_on:
            return None
        added = args[0].to(self.maps[0].dtype)
        for weight in self.maps:
            added = linear(added, weight)
        return (output + added).to(output.dtype)

    def change(self) -> Change | None:
        """Return what it adds to the layer's weight."""
        maps = [weight.cpu().double() for weight in self.maps]
        if not maps:
            return None
        if len(maps) == 1:
            return Change(maps[0], torch.eye(maps[0].shape[1], dtype=torch.float64))
        return Change(*maps[::-1])

    def plus(self, more: Change, device: torch.device) -> tuple[Tensor, ...]:
        """Return the maps with another change added, in float32 on a device."""
        present = self.change()
        whole = more if present is None else joined([present, more])
        rank, elements = len(whole.down), len(whole.up) * whole.down.shape[1]
        maps = (whole.up @ whole.down,) if rank * (len(whole.up) + whole.down.shape[1]) >= elements else whole[::-1]
        return tuple(weight.float().to(device).contiguous() for weight in maps)


def joined(changes: Sequence[Change]) -> Change:
    """Return the sum of changes of one layer."""
    return Change(torch.cat([c.up for c in changes], dim=1), torch.cat([c.down for c in changes]))


class LoraProxies(FullProxies):
    """K LoRA adapters on one base, of which one is active.

    Args:
        parameters: the factors of the active adapter, named ``<layer>.lora_A.default.weight`` (rank, in) and
            ``<layer>.lora_B.default.weight`` (out, rank) as peft does.
        optimizer: the plain torch optimizer over them.
        num_shards: number of proxies.
        store: where the offloaded ones wait.
        layers: each adapted layer of the active model; with several shards it gets a second adapter.
        scaling: the factor ``s`` of the adapter, alpha / rank.
        exchange: the processes that share the proxies; by default there is one.

    Attributes:
        residuals: the second adapter of each layer, which every averaging adds to; none with one shard.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        optimizer: Optimizer,
        num_shards: int,
        store: ProxyStore,
        layers: Mapping[str, nn.Module],
        scaling: float,
        exchange: ProcessGroup | None = None,
    ) -> None:
        super().__init__(parameters, optimizer, num_shards, store, exchange=exchange)
        self.scaling = scaling
        self.layers = sorted(layers)  # a sum depends on its order, and a resumed run must give the same
        self.residuals = {layer: FrozenAdapter(layers[layer]) for layer in self.layers if num_shards > 1}

    def average(self, weights: Sequence[float]) -> list[float]:
        """Average the proxies exactly: factors become their means, the rest joins the second adapter.

        Returns:
            The Frobenius distance of each proxy's merged weights from the aggregate before they were replaced.
        """
        if self.num_shards == 1:
            return [0.0]
        factors = self._all_factors()
        distances = self._distances(factors, weights)
        mean = aggregate(factors, weights)
        for layer, maps in self._grown_residuals(factors, weights, mean):
            self.residuals[layer].maps = maps
        self._share(WEIGHTS, mean)
        self._load(WEIGHTS, mean)
        return distances

    def distances(self, weights: Sequence[float]) -> list[float]:
        """Return the Frobenius distance of each proxy's merged weights from their mean, changing nothing."""
        return self._distances(self._all_factors(), weights)

    def _distances(self, factors: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> list[float]:
        # Rows are coefficients of the products B_k A_k; their inner products are those of the factors' Gram matrices.
        coefficients = torch.eye(self.num_shards, dtype=torch.float64) - _shares(weights)
        squares = torch.zeros(self.num_shards, dtype=torch.float64)
        for layer in self.layers:
            up = torch.cat([_double(state[layer + UP]) for state in factors], dim=1)
            down = torch.cat([_double(state[layer + DOWN]) for state in factors])
            products = (up.T @ up) * (down @ down.T)
            inner = products.unflatten(1, (self.num_shards, -1)).sum(2).unflatten(0, (self.num_shards, -1)).sum(1)
            squares += ((coefficients @ inner) * coefficients).sum(1).clamp_min(0) * self.scaling**2
        return squares.sqrt().tolist()

    @contextmanager
    def averaged(self, weights: Sequence[float]) -> Iterator[None]:
        """Put the mean of the merged proxies in the active model for a while (of the main process)."""
        if self.num_shards == 1:
            with evaluated(self.parameters, self.optimizer):
                yield
            return
        factors = self._all_factors()
        if not self.exchange.is_main:
            yield
            return
        own = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.parameters.items()}
        own_maps = {layer: residual.maps for layer, residual in self.residuals.items()}
        mean = aggregate(factors, weights)
        try:
            # The second adapter first: it is computed from the active factors as they are.
            for layer, maps in self._grown_residuals(factors, weights, mean):
                self.residuals[layer].maps = maps
            copy_tensors(mean, self.parameters)
            yield
        finally:
            copy_tensors(own, self.parameters)
            for layer, maps in own_maps.items():
                self.residuals[layer].maps = maps

    @contextmanager
    def without_residuals(self) -> Iterator[None]:
        """Take the second adapters out of the active model for a while."""
        for residual in self.residuals.values():
            residual.is_on = False
        try:
            yield
        finally:
            for residual in self.residuals.values():
                residual.is_on = True

    def changes(self, weights: Sequence[float]) -> dict[str, Change]:
        """Return by layer how the mean of the merged weights differs from the base.

        With several processes the main one gets it, the others nothing.
        """
        with evaluated(self.parameters, self.optimizer):
            factors, shares = self._all_factors(), _shares(weights)
            if not self.exchange.is_main:
                return {}
            found = {}
            for layer in self.layers:
                parts = [self.residuals[layer].change()] if self.residuals else []
                for state, share in zip(factors, shares, strict=True):
                    parts.append(
                        Change(share * self.scaling * _double(state[layer + UP]), _double(state[layer + DOWN]))
                    )
                found[layer] = joined([part for part in parts if part is not None])
            return found

    def save(self, folder: Path) -> dict[str, Any]:
        """Write all proxies and the second adapters as the averagings have left them, see the full-weight proxies."""
        if self.exchange.is_main:
            maps = {layer: residual.maps for layer, residual in self.residuals.items()}
            save_file({f"{layer}|{i}": m for layer in maps for i, m in enumerate(maps[layer])}, folder / RESIDUAL_FILE)
        return super().save(folder)

    def load(self, folder: Path, index: Mapping[str, Any]) -> None:
        """Take over all proxies and second adapters from a folder written by ``save``."""
        super().load(folder, index)
        saved = load_file(folder / RESIDUAL_FILE)
        for layer, residual in self.residuals.items():
            names = [name for name in (f"{layer}|0", f"{layer}|1") if name in saved]
            device = self.parameters[layer + UP].device
            residual.maps = tuple(saved[name].to(device, copy=True) for name in names)

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

    def _grown_residuals(
        self, factors: Sequence[Mapping[str, Tensor]], weights: Sequence[float], mean: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Yield the maps of each layer's second adapter after an averaging with these mean factors."""
        *others, last = factors
        shares = _shares(weights)
        for layer, residual in self.residuals.items():
            up, down = layer + UP, layer + DOWN
            ups = [
                share * self.scaling * (_double(state[up]) - _double(mean[up]))
                for state, share in zip(others, shares, strict=False)
            ]
            downs = [_double(state[down]) - _double(last[down]) for state in others]
            more = Change(torch.cat(ups, dim=1), torch.cat(downs))
            yield layer, residual.plus(more, self.parameters[up].device)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()  # on the host: Apple's GPUs know no float64


def _shares(weights: Sequence[float]) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)
