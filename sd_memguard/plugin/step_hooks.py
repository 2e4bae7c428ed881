"""Hooks on an optimizer's steps, also where a trainer has put a function of its own in the place of ``step``."""

import functools
from collections import OrderedDict
from types import MethodType
from typing import Any

from torch.optim import Optimizer


def call_hooks_of(optimizer: Optimizer) -> None:
    """See to it that a ``step`` of the optimizer's own calls the hooks that are registered with the optimizer.

    torch calls them from the ``step`` of the class. OneTrainer and others replace that of the instance, so that no hook
    is called; a learning-rate schedule wraps it, and they are. Either way they are called once, around the whole step.
    """
    own = vars(optimizer).get("step")
    if own is None or getattr(own, "calls_hooks", False):
        return

    @functools.wraps(own)  # torch's schedules look for a mark that they have left on it
    def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        given: Any = (optimizer, *args)
        for hook in list(before.values()):
            changed = hook(optimizer, given, kwargs)
            if changed is not None:
                given, kwargs = changed
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        try:
            result = own(*given[1:], **kwargs)
        finally:
            optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = before, after
        for listener in list(after.values()):
            listener(optimizer, given, kwargs)
        return result

    step.calls_hooks = True  # type: ignore[attr-defined]
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
