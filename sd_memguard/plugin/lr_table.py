"""The learning rate of each proxy in a loop whose schedule somebody else has made."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from sd_memguard.errors import LoopError

LRTable = list[list[float]]


def tabulate(lr_scheduler: Any, optimizer: Optimizer, steps: int) -> LRTable:
    """Return the learning rates of the plain run: row s holds that of each parameter group at its optimizer step s.

    The schedule is run ahead and set back, so that any of torch's can be used.

    Args:
        lr_scheduler: stepped once after each optimizer step, as torch documents; accelerate's wrapper will do too.
        optimizer: what it schedules.
        steps: number of rows.

    Raises:
        LoopError: the schedule depends on more than the step.
    """
    schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
    if not isinstance(schedule, LRScheduler) or isinstance(schedule, ReduceLROnPlateau):
        raise LoopError(
            f"`lr_scheduler` must be one of torch's that depends on the step alone, got {type(schedule).__name__}: a "
            "proxy needs the learning rate of steps that are yet to come; use another schedule, or omit it and "
            "set the learning rate in the loop"
        )
    saved = copy.deepcopy(schedule.state_dict())
    # OneCycleLR sets the momentum or the betas besides.
    groups = [{key: copy.deepcopy(group[key]) for key in group if key != "params"} for group in optimizer.param_groups]
    table = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of schedules that step before their optimizer has
            for _ in range(steps):
                table.append(learning_rates(optimizer))
                if not _is_over(schedule):
                    schedule.step()
    finally:
        schedule.load_state_dict(saved)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: before[key] for key in before if key != "lr"})
        set_learning_rates(optimizer, [float(before["lr"]) for before in groups])
    return table


def learning_rates(optimizer: Optimizer) -> list[float]:
    """Return the learning rate of each parameter group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_learning_rates(optimizer: Optimizer, rates: Sequence[float]) -> None:
    """Set the learning rate of each parameter group; one that is a tensor keeps its place."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _is_over(schedule: LRScheduler) -> bool:
    """Say whether a schedule of a fixed length (OneCycleLR) has been used up; it keeps its last value then."""
    total = getattr(schedule, "total_steps", None)
    return total is not None and schedule.last_epoch >= total - 1
