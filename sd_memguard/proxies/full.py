"""Full-weight proxies: one model and one optimizer state are active, whatever the number of shards is."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sd_memguard.core.aggregation import distance, iterate_aggregate
from sd_memguard.distributed import ProcessGroup
from sd_memguard.proxies.store import LazyTensors, ProxyStore, apart
from sd_memguard.proxies.swap import (
    EmaState,
    copy_tensors,
    evaluated,
    group_numbers,
    load_optimizer_tensors,
    optimizer_tensors,
)

WEIGHTS, EMA, OPTIMIZER = "weights", "ema", "optimizer"


class FullProxies:
    """K proxies of one model, of which one is active and the others rest in a store.

    A proxy is three parts: ``weights``, ``ema`` (where there is one) and ``optimizer``. Each offloaded part is an entry
    of the store; after an aggregation all offloaded proxies share one entry of weights. The active one has none, so
    that the store holds K - 1 proxies, and during a switch one part more.

    With several processes, process r of n has the proxies r, r + n, r + 2n, ... and never sees the others: a mean is a
    sum of partial sums, exchanged some tensors at a time. All processes call each method that speaks of all proxies.

    Args:
        parameters: the trained parameters of the active model by name.
        optimizer: the plain torch optimizer over them.
        num_shards: number of proxies.
        store: where the offloaded ones wait; unused with one proxy.
        ema: the EMA of the parameters, in their order.
        exchange: the processes that share the proxies; by default there is one.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        optimizer: Optimizer,
        num_shards: int,
        store: ProxyStore,
        ema: EmaState | None = None,
        exchange: ProcessGroup | None = None,
    ) -> None:
        self.parameters, self.optimizer, self.num_shards, self.ema = dict(parameters), optimizer, num_shards, ema
        self.exchange = ProcessGroup(alone=True) if exchange is None else exchange
        self.own = range(self.exchange.rank, num_shards, self.exchange.size)
        self._store = store
        self._group_begin = group_numbers(optimizer)
        self._serial = 0
        self.active = self.own[0]
        self._ema_steps = [0] * num_shards
        self._entries: list[dict[str, str]] = [{} for _ in range(num_shards)]
        if num_shards > 1:
            for part in self.averaged_parts:
                self._share(part, self._active_part(part))
            for shard_index in self.own[1:]:
                self._replace(shard_index, OPTIMIZER, self._put(OPTIMIZER, {}))

    @property
    def averaged_parts(self) -> tuple[str, ...]:
        """The parts that are averaged and broadcast."""
        return (WEIGHTS,) if self.ema is None else (WEIGHTS, EMA)

    def activate(self, shard_index: int) -> None:
        """Make a proxy the active one; the present one goes to the store."""
        if shard_index == self.active:
            return
        for part in (*self.averaged_parts, OPTIMIZER):
            self._replace(self.active, part, self._put(part, self._active_part(part)))
            self._load(part, self._store.get(self._entries[shard_index][part]))
            self._release(self._entries[shard_index].pop(part))
        if self.ema is not None:
            self._ema_steps[self.active] = self.ema.optimization_step
            self.ema.optimization_step = self._ema_steps[shard_index]
        self.active = shard_index

    def aggregate(self, weights: Sequence[float], part: str = WEIGHTS) -> dict[str, Tensor]:
        """Return the weighted mean of a part over the proxies as they are now, on the CPU."""
        return dict(self._means(part, weights))

    def average(self, weights: Sequence[float]) -> list[float]:
        """Average the proxies and broadcast the aggregate to all of them; optimizer states stay with their proxy.

        Returns:
            The Euclidean distance of each proxy's weights from the aggregate before they were replaced.
        """
        if self.num_shards == 1:
            return [0.0]
        squares: list[list[float]] = [[] for _ in range(self.num_shards)]
        active = self._active_part(WEIGHTS)
        for name, mean in self._compared_means(weights, squares):
            active[name].copy_(mean)
        self._share(WEIGHTS, active)
        if self.ema is not None:
            active = self._active_part(EMA)
            self._load_aggregate(EMA, weights, active)
            self._share(EMA, active)
        return self._roots(squares)

    def distances(self, weights: Sequence[float]) -> list[float]:
        """Return the Euclidean distance of each proxy's weights from their mean, changing nothing."""
        if self.num_shards == 1:
            return [0.0]
        squares: list[list[float]] = [[] for _ in range(self.num_shards)]
        for _ in self._compared_means(weights, squares):
            pass
        return self._roots(squares)

    def _compared_means(self, weights: Sequence[float], squares: list[list[float]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the mean of the weights tensor by tensor, and note each proxy's squared distance from it before."""
        states = self._states(WEIGHTS)
        for name, mean in self._means(WEIGHTS, weights):
            for k, state in zip(self.own, states, strict=True):
                squares[k].append(distance({name: state[name]}, {name: mean}) ** 2)
            yield name, mean

    def _roots(self, squares: list[list[float]]) -> list[float]:
        # An exact sum: a resumed run reads the tensors in another order.
        distances = [math.sqrt(math.fsum(parts)) for parts in squares]
        return self.exchange.all_reduce(torch.tensor(distances, dtype=torch.float64), "distances").tolist()

    @contextmanager
    def averaged(self, weights: Sequence[float]) -> Iterator[None]:
        """Put what would be exported (the mean of the EMA, else of the weights) in the active model for a while.

        With several processes only the main one holds it.
        """
        if self.num_shards == 1 and self.ema is None:
            with evaluated(self.parameters, self.optimizer):
                yield
            return
        if not self.exchange.is_main:  # gives its share of the mean, and keeps its own weights
            for _ in self._means(self.averaged_parts[-1], weights):
                pass
            yield
            return
        key = self._put(WEIGHTS, self._active_part(WEIGHTS))  # on disk that takes no memory
        try:
            self._load_aggregate(self.averaged_parts[-1], weights, self._active_part(WEIGHTS))
            yield
        finally:
            self._load(WEIGHTS, self._store.get(key))
            self._store.drop(key)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write all proxies to a folder (hard links where the store has them) and return their JSON-ready index.

        With several processes each writes its own, under names that begin with its rank.
        """
        prefix = f"process-{self.exchange.rank}-" if self.exchange.size > 1 else ""
        if self.ema is not None:
            self._ema_steps[self.active] = self.ema.optimization_step
        entries: dict[int, dict[str, str]] = {}
        for shard_index in self.own:
            files = entries[shard_index] = {}
            for part in (*self.averaged_parts, OPTIMIZER):
                if shard_index == self.active:
                    files[part] = f"{prefix}active-{part}.safetensors"
                    save_file(apart(self._active_part(part)), folder / files[part])
                else:
                    files[part] = f"{prefix}{self._entries[shard_index][part]}.safetensors"
                    if not (folder / files[part]).exists():
                        self._store.write(self._entries[shard_index][part], folder / files[part])
        own = [(k, files, self._ema_steps[k]) for k, files in entries.items()]
        found = self.exchange.all_gather_object(own, "index")
        rows = sorted((row for part in found for row in part), key=lambda row: row[0])
        return {
            "active": self.active,
            "entries": [files for _, files, _ in rows],
            "ema_steps": [steps for *_, steps in rows],
        }

    def load(self, folder: Path, index: Mapping[str, Any]) -> None:
        """Take over all proxies from a folder written by ``save``.

        Raises:
            ValueError: it holds another number of proxies, or was written with EMA where there is none, or without.
        """
        entries = index["entries"]
        parts = {*self.averaged_parts, OPTIMIZER}
        if len(entries) != self.num_shards or set(entries[0]) != parts:
            raise ValueError(
                f"the checkpoint holds {len(entries)} proxies with the parts {sorted(entries[0])}, "
                f"this run has {self.num_shards} with {sorted(parts)}"
            )
        adopted: dict[str, str] = {}
        self.active = index["active"] if index["active"] in self.own else self.own[0]
        if self.num_shards > 1:
            self._forget(self.active)
            for shard_index in self.own:
                if shard_index == self.active:
                    continue
                for part, file in entries[shard_index].items():
                    if file not in adopted:
                        adopted[file] = self._new_key(part)
                        self._store.adopt(adopted[file], folder / file)
                    self._replace(shard_index, part, adopted[file])
        self._ema_steps = list(index["ema_steps"])
        if self.ema is not None:
            self.ema.optimization_step = self._ema_steps[self.active]
        for part, file in entries[self.active].items():
            self._load(part, LazyTensors(folder / file))

    def _active_part(self, part: str) -> dict[str, Tensor]:
        if part == OPTIMIZER:
            return optimizer_tensors(self.parameters, self.optimizer, self._group_begin)
        if part == EMA and self.ema is not None:
            return dict(zip(self.parameters, self.ema.shadow_params, strict=True))
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def _load(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        if part == OPTIMIZER:
            load_optimizer_tensors(tensors, self.parameters, self.optimizer, self._group_begin)
        else:
            copy_tensors(tensors, self._active_part(part))

    @torch.no_grad()
    def _load_aggregate(self, part: str, weights: Sequence[float], target: Mapping[str, Tensor]) -> None:
        """Copy the aggregate of a part into tensors, one at a time: at no time is there a second model."""
        # A target may be the active state itself: each of its tensors was read when its mean arrives.
        for name, mean in self._means(part, weights):
            target[name].copy_(mean)

    def _means(self, part: str, weights: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weighted mean of a part over all proxies, tensor by tensor."""
        if self.exchange.size == 1:
            return iterate_aggregate(self._states(part), weights)
        return iterate_aggregate(
            self._states(part),
            [weights[shard_index] for shard_index in self.own],
            names=list(self.parameters),  # a file may hold the tensors in another order than a model
            total=math.fsum(weights),
            combine=lambda partial: self.exchange.all_reduce(partial, f"mean of {part}"),
        )

    def _states(self, part: str) -> list[Mapping[str, Tensor]]:
        """Return a part of each proxy of this process."""
        return [self._state(shard_index, part) for shard_index in self.own]

    def _state(self, shard_index: int, part: str) -> Mapping[str, Tensor]:
        if shard_index == self.active:
            return self._active_part(part)
        return self._store.get(self._entries[shard_index][part])

    def _new_key(self, part: str) -> str:
        self._serial += 1
        return f"{part}-{self._serial:06d}"

    def _put(self, part: str, tensors: Mapping[str, Tensor]) -> str:
        key = self._new_key(part)
        self._store.put(key, tensors)
        return key

    def _share(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Give all offloaded proxies the same part."""
        offloaded = [shard_index for shard_index in self.own if shard_index != self.active]
        if offloaded:
            key = self._put(part, tensors)
            for shard_index in offloaded:
                self._replace(shard_index, part, key)

    def _replace(self, shard_index: int, part: str, key: str) -> None:
        """Point a proxy's part at another entry."""
        old = self._entries[shard_index].get(part)
        self._entries[shard_index][part] = key
        if old is not None:
            self._release(old)

    def _forget(self, shard_index: int) -> None:
        """Drop the entries of a proxy that is about to be active."""
        while self._entries[shard_index]:
            self._release(self._entries[shard_index].popitem()[1])

    def _release(self, key: str) -> None:
        """Drop an entry when no proxy points at it any more."""
        if all(key not in entries.values() for entries in self._entries):
            self._store.drop(key)
