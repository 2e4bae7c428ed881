"""Optimizer steps that do not wait for the device to learn whether the gradient is finite."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import Parameter

from sd_memguard.core.host_copy import HostCopy


class Updates:
    """Clips gradients and steps.

    A gradient that is not finite must not reach the weights. The kernel of torch's fused AdamW is told on the device
    (``found_inf``, as a GradScaler does it) and then leaves weights, moments and step counts as they are; an optimizer
    without it has to be left alone by the host, which waits for the norm. A GradScaler looks after both by itself.

    Args:
        accelerator: clips, and holds the GradScaler under fp16.
        optimizer: as prepared by it.
        parameters: that are trained.
        max_grad_norm: to which the gradients are clipped.
    """

    def __init__(
        self, accelerator: Accelerator, optimizer: Any, parameters: Sequence[Parameter], max_grad_norm: float
    ) -> None:
        self.accelerator, self.optimizer, self.parameters = accelerator, optimizer, parameters
        self.max_grad_norm = max_grad_norm
        self.inner = getattr(optimizer, "optimizer", optimizer)
        self.is_fused = bool(self.inner.param_groups[0].get("fused"))

    def take(self, scale: float) -> HostCopy | None:
        """Take a step with the gradients times ``scale``, clipped; they are gone afterwards.

        Returns:
            The norm of the gradients on its way to the host: where it is not finite no step was taken. None where a
            GradScaler decides.
        """
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], scale)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if self.accelerator.scaler is not None:
            self.optimizer.step()
        elif self.is_fused:
            self.inner.found_inf = (~torch.isfinite(norm)).float()
            self.optimizer.step()
            del self.inner.found_inf
        elif math.isfinite(float(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return None if self.accelerator.scaler is not None else HostCopy(norm)
