"""IET: the aggregate of the proxies, ``theta = sum_k w_k theta_k`` (arXiv 2407.15328, section 4.1)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]

TOGETHER = 2**22
"""Numbers from which on tensors are combined over processes at once: an exchange of each small one would cost more."""


def aggregate(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of states, on the CPU.

    Summed in float64 and cast once, so that the mean of one state, or of equal states with weights that are sums of
    powers of two, is that state. Tensors are read one name at a time, so lazy states cost one tensor, not K models.

    Args:
        states: one mapping of names to floating-point tensors for each proxy, equal names and shapes.
        weights: one non-negative weight for each proxy; normalized here. The paper weighs equally, we by shard size.

    Raises:
        ValueError: no states, names that differ, or weights that cannot be normalized.

    >>> aggregate([{"w": torch.tensor([0.0])}, {"w": torch.tensor([3.0])}], [2, 1])
    {'w': tensor([1.])}
    """
    return dict(iterate_aggregate(states, weights))


def iterate_aggregate(
    states: Sequence[State],
    weights: Sequence[float],
    *,
    names: Sequence[str] | None = None,
    total: float | None = None,
    combine: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the aggregate tensor by tensor, see ``aggregate``.

    Args:
        states: as there.
        weights: as there.
        names: the order of the tensors; by default that of the first state.
        total: what the weights are divided by; by default their sum.
        combine: takes float64 sums over these states, (n,), and returns those over all states of all processes, which
            must then give the same ``names`` and ``total``.
    """
    total = math.fsum(weights) if total is None else total
    if not states or len(states) != len(weights) or min(weights) < 0 or not 0 < total < math.inf:
        raise ValueError(f"{len(states)} states need as many weights, none negative, some positive; got {weights}")
    names = list(states[0]) if names is None else names
    for state in states:
        if set(state) != set(names):
            raise ValueError(f"the states differ in their names: {sorted(set(state) ^ set(names))[:3]}")
    waiting: dict[str, tuple[Tensor, torch.dtype]] = {}
    for name in names:
        first = states[0][name]
        mean = torch.zeros(first.shape, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            mean.add_(state[name].cpu().double(), alpha=weight / total)
        if combine is None:
            yield name, mean.to(first.dtype)
            continue
        waiting[name] = mean, first.dtype
        if name == names[-1] or sum(partial.numel() for partial, _ in waiting.values()) >= TOGETHER:
            yield from _combined(waiting, combine)
            waiting = {}


def _combined(
    partial: Mapping[str, tuple[Tensor, torch.dtype]], combine: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors combined in one call, each cast to its kind."""
    flat = combine(torch.cat([tensor.flatten() for tensor, _ in partial.values()]))
    pieces = flat.split([tensor.numel() for tensor, _ in partial.values()])
    for (name, (tensor, dtype)), piece in zip(partial.items(), pieces, strict=True):
        yield name, piece.view(tensor.shape).to(dtype)


def distance(state: State, mean: State) -> float:
    """Return the Euclidean distance between two states, over all their tensors."""
    return math.sqrt(
        math.fsum(float((state[name].cpu().double() - mean[name].cpu().double()).square().sum()) for name in mean)
    )
