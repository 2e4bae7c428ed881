"""What differs between a plain torch loop and one that uses accelerate; both are spoken to without importing either."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from sd_memguard.environment import SPREADING
from sd_memguard.errors import LoopError


class LoopBackend(Protocol):
    """The loop around the guard, as far as the guard needs to know it."""

    def place(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch where the loop expects it."""

    def begin_epoch(self, loader: Any) -> None:
        """Hear that an epoch begins; ``loader.end_of_dataloader`` says when its last batch is out."""

    def end_epoch(self, loader: Any) -> None:
        """Hear that the epoch is over or was broken off."""

    def overflowed(self) -> bool:
        """Say whether a step was due since the last batch but a gradient scaler has left it out."""

    def grad_scaler(self) -> Any:
        """Return the gradient scaler of the loop, None where that is not known."""

    @property
    def num_processes(self) -> int:
        """Processes that train together."""


class PlainBackend:
    """A plain torch loop: it moves batches itself, and tells nobody when it accumulates.

    Args:
        scaler: its gradient scaler, where it has told of one.
    """

    def __init__(self, scaler: Any = None) -> None:
        self.scaler = scaler

    def place(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch as it is."""
        return batch

    def begin_epoch(self, loader: Any) -> None:
        """Do nothing."""

    def end_epoch(self, loader: Any) -> None:
        """Do nothing."""

    def overflowed(self) -> bool:
        """Return False: a step that was skipped cannot be told from a batch that was accumulated."""
        return False

    def grad_scaler(self) -> Any:
        """Return the one that was given; where there is none, one is looked for in the process."""
        return self.scaler

    @property
    def num_processes(self) -> int:
        """Processes that train together."""
        return torch.distributed.get_world_size() if _is_distributed() else 1


class AccelerateBackend:
    """A loop that uses accelerate.

    Args:
        accelerator: the loop's ``Accelerator``.

    Raises:
        LoopError: a plugin spreads the model or its optimizer over processes.
    """

    def __init__(self, accelerator: Any) -> None:
        kind = getattr(accelerator.distributed_type, "name", str(accelerator.distributed_type))
        if kind in SPREADING:
            raise LoopError(
                f"the accelerator runs {kind}, which spreads weights and optimizer over processes, so that the guard "
                "cannot leave a step out; run `accelerate config` without it, or launch with `--num_processes 1`"
            )
        self.accelerator = accelerator

    def place(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Move the tensors of the batch to the device, as a prepared dataloader does."""
        placed: dict[str, Any] = _move(batch, self.accelerator.device)
        return placed

    def begin_epoch(self, loader: Any) -> None:
        """Make the loader the active one, so that `accumulate` takes a step on the last batch of the epoch."""
        self.accelerator.gradient_state._add_dataloader(loader)

    def end_epoch(self, loader: Any) -> None:
        """Undo ``begin_epoch``."""
        self.accelerator.gradient_state._remove_dataloader(loader)

    def overflowed(self) -> bool:
        """Say whether the gradient scaler has skipped the step of a batch that closed its window."""
        return self.accelerator.scaler is not None and bool(self.accelerator.sync_gradients)

    def grad_scaler(self) -> Any:
        """Return the accelerator's."""
        return self.accelerator.scaler

    @property
    def num_processes(self) -> int:
        """Processes that train together."""
        return int(self.accelerator.num_processes)


def sum_over_processes(tensor: Tensor) -> None:
    """Sum a tensor over the processes that train together, in place."""
    torch.distributed.all_reduce(tensor)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def plain_optimizer(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside what accelerate made of it.

    Raises:
        LoopError: there is none, so that its steps cannot be seen.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        raise LoopError(
            f"`optimizer` must be a torch.optim.Optimizer, got {type(inner).__name__}, whose steps the "
            "guard cannot see; use an optimizer that derives from it"
        )
    return inner


def _move(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return type(value)({key: _move(item, device) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_move(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_move(item, device) for item in value)
    return value
