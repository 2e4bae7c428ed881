"""Optimizer steps that neither wait for the device nor go through the gradients more often than they must."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from sd_memguard.core.async_copy import AsyncCPUCopy


class ClippedStep:
    """Clips gradients and steps.

    A gradient that is not finite must not reach the weights. The kernel of torch's fused AdamW is told on the device,
    by the two attributes through which a GradScaler speaks to it: ``found_inf``, by which it leaves weights, moments
    and step counts as they are, and ``grad_scale``, by which it divides the gradients while it reads them, so that
    scaling and clipping read the gradients no further time. With another optimizer the host waits for
    the norm. A GradScaler looks after its own gradients.

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
        # Other packages may have a `fused` of their own, which knows nothing of these attributes.
        is_torch = type(self.inner).__module__.startswith("torch.optim.")
        self.is_fused = is_torch and bool(self.inner.param_groups[0].get("fused"))

    def step(self, scale: float) -> AsyncCPUCopy:
        """Take a step with the gradients times ``scale``, clipped; they are gone afterwards.

        Returns:
            The norm of the gradients on its way to the host: where it is not finite no step was taken. Where there is a
            GradScaler, it decides so.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        scaler = self.accelerator.scaler
        if self.is_fused and scaler is None:
            norm = scale * get_total_norm(gradients)
            self._step_fused(norm, scale)
        else:
            if scale != 1.0:
                torch._foreach_mul_(gradients, scale)
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
            if scaler is not None or math.isfinite(float(norm)):
                self.optimizer.step()
        self.optimizer.zero_grad()
        return AsyncCPUCopy(norm)

    def _step_fused(self, norm: Tensor, scale: float) -> None:
        # The factor is that of torch.nn.utils.clip_grad_norm_.
        factor = scale * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.inner.grad_scale, self.inner.found_inf = factor.reciprocal(), (~torch.isfinite(norm)).float()
        try:
            self.optimizer.step()
        finally:
            del self.inner.grad_scale, self.inner.found_inf
