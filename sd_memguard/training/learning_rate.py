"""The learning rate as a function of the step: nothing to save, nothing to restore."""

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler


def learning_rate_schedule(
    name: str, base: float, warmup_steps: int, total_steps: int, num_shards: int, step_rules: str | None = None
) -> Callable[[int], float]:
    """Return the learning rate of a proxy at its step j: that of the plain run at step ``num_shards * j``.

    Args:
        name: one of diffusers' schedules.
        base: the learning rate that the schedule multiplies.
        warmup_steps: warm-up of the plain run, in its steps.
        total_steps: optimizer steps over all proxies.
        num_shards: number of proxies.
        step_rules: of ``piecewise_constant``, in the plain run's steps.
    """
    bystander = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    scheduler = get_scheduler(
        name, bystander, step_rules=step_rules, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    factor = scheduler.lr_lambdas[0]  # all of diffusers' schedules are LambdaLR
    return lambda step: base * factor(num_shards * step)
