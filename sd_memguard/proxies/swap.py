"""Reading the active model's state out and copying another proxy's in, in place.

Parameters, optimizer tensors and EMA shadows keep their storage, so that optimizers, compiled modules and references to
them stay valid across a switch.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

NUMBER = ":number"
"""Suffix of an optimizer entry that is a plain number, stored as a scalar tensor."""


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


def optimizer_tensors(parameters: Mapping[str, Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as ``<parameter>|<key>`` to tensor."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value
            else:
                tensors[f"{name}|{key}{NUMBER}"] = torch.tensor(value)
    return tensors


@torch.no_grad()
def load_optimizer_tensors(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Parameter], optimizer: Optimizer
) -> None:
    """Give the optimizer a saved state, in place where it has one already; a parameter without entries starts again."""
    saved = {entry.rsplit("|", 1)[0] for entry in tensors}
    for name in parameters.keys() - saved:
        optimizer.state.pop(parameters[name], None)
    on_device = {
        id(parameter): group.get("fused") or group.get("capturable")
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for entry in tensors:
        name, key = entry.rsplit("|", 1)
        parameter, tensor = parameters[name], tensors[entry]
        state = optimizer.state[parameter]
        if key.endswith(NUMBER):
            state[key.removesuffix(NUMBER)] = tensor.item()
        elif key in state:
            state[key].copy_(tensor, non_blocking=state[key].is_cuda)
        else:
            # torch keeps AdamW's `step` on the host unless the optimizer is fused or capturable.
            stays = key == "step" and not on_device[id(parameter)]
            state[key] = tensor.to("cpu" if stays else parameter.device, copy=True)
