"""Reading the active model's state out and copying another proxy's in, in place.

Parameters, optimizer tensors and EMA shadows keep their storage, so that optimizers, compiled modules and references to
them stay valid across a switch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

NUMBER, NOTHING = ":number", ":none"
"""Suffixes of an optimizer entry that is a plain number, stored as a scalar tensor, or None."""
GROUP = ":group"
"""In the place of a parameter's name: an entry of a group of parameters."""
SET_BY_SCHEDULES = ("lr", "initial_lr")
"""Numbers of a group that are set before each step, and are no state."""

GroupNumbers = list[dict[str, Any]]
"""What each group of parameters has of numbers."""


class EmaState(Protocol):
    """What an EMA of the parameters shows of itself (``diffusers.training_utils.EMAModel`` does)."""

    shadow_params: list[Tensor]
    optimization_step: int


@torch.no_grad()
def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy tensors by name into the storage of the targets.

    CUDA reads the host's memory before the host can change it, also where it does not wait; other devices may not.
    """
    for name, tensor in target.items():
        tensor.copy_(source[name], non_blocking=tensor.is_cuda)


def optimizer_tensors(
    parameters: Mapping[str, Parameter], optimizer: Optimizer, begin: GroupNumbers | None = None
) -> dict[str, Tensor]:
    """Return the optimizer's state as ``<parameter>|<key>`` to tensor.

    Args:
        parameters: by name.
        optimizer: over them.
        begin: ``group_numbers`` of the optimizer before its first step. What has changed of them since (Prodigy's
            estimate of the step size, the step count of schedule-free) is part of the state, as ``:group<i>|<key>``.

    Raises:
        TypeError: an entry is neither a tensor nor a number, e.g. a list of tensors.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            _add_entry(tensors, f"{name}|{key}", value)
    for index, (now, before) in enumerate(zip(group_numbers(optimizer), begin or (), strict=False)):
        for key, value in now.items():
            if key not in before or not _is_equal(before[key], value):
                _add_entry(tensors, f"{GROUP}{index}|{key}", value)
    return tensors


def _add_entry(tensors: dict[str, Tensor], entry: str, value: Any) -> None:
    if isinstance(value, Tensor):
        tensors[entry] = value
    elif isinstance(value, bool | int | float):
        # A float has the precision of a double, which torch would round.
        dtype = torch.float64 if isinstance(value, float) else None
        tensors[f"{entry}{NUMBER}"] = torch.tensor(value, dtype=dtype)
    elif value is None:
        tensors[f"{entry}{NOTHING}"] = torch.zeros(0)
    else:
        raise TypeError(f"`{entry.rsplit('|', 1)[1]}` of the optimizer's state is a {type(value).__name__}")


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def group_numbers(optimizer: Optimizer) -> GroupNumbers:
    """Return a copy of the numbers that the optimizer keeps in each group of parameters, without the learning rate."""
    return [
        {
            key: value.detach().clone() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key not in SET_BY_SCHEDULES and isinstance(value, bool | int | float | Tensor)
        }
        for group in optimizer.param_groups
    ]


@torch.no_grad()
def load_optimizer_tensors(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
    begin: GroupNumbers | None = None,
) -> None:
    """Give the optimizer a saved state, in place where it has one already; a parameter without entries starts again.

    Args:
        tensors: of ``optimizer_tensors``.
        parameters: by name.
        optimizer: over them.
        begin: what each group has where nothing was saved for it, see ``optimizer_tensors``.
    """
    saved = {entry.rsplit("|", 1)[0] for entry in tensors}
    for name in parameters.keys() - saved:
        optimizer.state.pop(parameters[name], None)
    _load_groups(tensors, optimizer, begin or [])
    on_device = {
        id(parameter): group.get("fused") or group.get("capturable")
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for entry in tensors:
        name, key = entry.rsplit("|", 1)
        if name.startswith(GROUP):
            continue
        parameter, tensor = parameters[name], tensors[entry]
        state = optimizer.state[parameter]
        if key.endswith((NUMBER, NOTHING)):
            state[_plain_key(key)] = _plain_value(key, tensor)
        elif isinstance(present := state.get(key), Tensor) and present.shape == tensor.shape:
            present.copy_(tensor, non_blocking=present.is_cuda)
        else:
            # torch keeps AdamW's `step` on the host unless the optimizer is fused or capturable.
            stays = key == "step" and not on_device[id(parameter)]
            state[key] = tensor.to("cpu" if stays else parameter.device, copy=True)


def _load_groups(tensors: Mapping[str, Tensor], optimizer: Optimizer, begin: GroupNumbers) -> None:
    for index, (group, before) in enumerate(zip(optimizer.param_groups, begin, strict=False)):
        for key in group_numbers(optimizer)[index].keys() - before.keys():
            del group[key]  # came with the first steps, e.g. Prodigy's `d_hat`
        group.update({key: value.clone() if isinstance(value, Tensor) else value for key, value in before.items()})
        prefix = f"{GROUP}{index}|"
        for entry in tensors:
            if entry.startswith(prefix):
                key = entry.removeprefix(prefix)
                group[_plain_key(key)] = _plain_value(key, tensors[entry])


def _plain_key(key: str) -> str:
    return key.removesuffix(NUMBER).removesuffix(NOTHING)


def _plain_value(key: str, tensor: Tensor) -> Any:
    if key.endswith(NOTHING):
        return None
    return tensor.item() if key.endswith(NUMBER) else tensor.clone()


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether what the optimizer trains is not what it would have evaluated and saved: it has two modes for that.

    Its weights between steps are an interpolation; its ``eval()`` replaces them by their average over the steps
    (https://arxiv.org/abs/2405.15682), and ``train()`` takes that back, but for rounding.
    """
    modes = [getattr(optimizer, name, None) for name in ("train", "eval")]
    return all(callable(mode) for mode in modes) and "train_mode" in optimizer.param_groups[0]


@contextmanager
def evaluated(parameters: Mapping[str, Parameter], optimizer: Optimizer) -> Iterator[None]:
    """Put the weights that a schedule-free optimizer would have evaluated in their place for a while.

    Afterwards they are what they were, to the bit. Nothing happens with another optimizer, or outside its training
    mode.
    """
    if not (is_schedule_free(optimizer) and optimizer.param_groups[0]["train_mode"]):
        yield
        return
    own = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        copy_tensors(own, parameters)
