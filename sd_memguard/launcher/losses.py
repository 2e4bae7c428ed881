"""Finds the losses in a script that knows nothing of the guard.

The script calls its UNet and later ``mse_loss`` on what came out. The two are matched by memory: the loss's first
argument lies in the storage of the UNet's output, also after ``.float()`` of a float32 tensor or ``torch.chunk``, and
its offset there says which rows of the batch it is.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sd_memguard.errors import LoopError
from sd_memguard.guard import MemorizationGuard


class Output(NamedTuple):
    """What the UNet returned in a training forward, (B, C, h, w), and the timesteps it was given, (B,)."""

    prediction: Tensor
    timesteps: Tensor


class LossMatcher:
    """Weighs the losses that a script takes of its UNet's output.

    Rows beyond the samples of the batch are class images (prior preservation), which are never skipped.

    Args:
        guard: weighs them.
        plain_mse_loss: torch's own function.
    """

    def __init__(self, guard: MemorizationGuard, plain_mse_loss: Callable[..., Tensor]) -> None:
        self.guard, self.plain_mse_loss = guard, plain_mse_loss
        self.output: Output | None = None
        self.num_forwards = self.num_matched = 0

    def watch(self, unet: nn.Module) -> None:
        """See what the UNet returns from now on."""
        unet.register_forward_hook(self._remember, with_kwargs=True)

    def _remember(self, unet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():  # validation, or the extra forward of DREAM
            return
        self.num_forwards += 1
        prediction = output[0] if isinstance(output, tuple) else output.sample
        timesteps = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"], device=prediction.device)
        self.output = Output(prediction, timesteps.expand(len(prediction)).long())

    def mse_loss(self, input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean squared error as torch does, of the clean samples alone where it is the UNet's."""
        loss: Tensor = self.plain_mse_loss(input, target, *args, **kwargs)
        first = self._first_row(input)
        if self.output is None or first is None:
            return loss
        attachment = self.guard.attachment
        assert attachment is not None
        window, rows = attachment.driver.window, len(input)
        if first >= len(window.sample_ids):
            window.unguarded += rows
            return loss
        if args or kwargs.get("reduction", "mean") not in {"mean", "none"} or set(kwargs) - {"reduction"}:
            raise LoopError(
                f"the script calls mse_loss with {args or ''} {kwargs}; the guard knows `reduction` mean and none"
            )
        self.num_matched += 1
        losses = (input.float() - target.float()).square().mean(dim=list(range(1, input.dim())))
        sample_ids = torch.tensor(window.sample_ids[first : first + rows], device=input.device)
        verdict = self.guard.weigh(losses, self.output.timesteps[first : first + rows], sample_ids)
        divisor = attachment.driver.divisor
        if verdict.num_clean == rows and divisor == rows:
            return loss
        if kwargs.get("reduction", "mean") == "mean":
            return verdict.loss
        # The script's own mean over the batch, perhaps weighted, becomes that over the clean samples.
        clean = verdict.weights
        return loss * (clean * (rows / divisor)).view(-1, *(1 for _ in input.shape[1:]))

    def _first_row(self, tensor: Tensor) -> int | None:
        """Return which row of the UNet's output a tensor begins with, None where it does not lie there."""
        if self.output is None or tensor.dim() == 0:
            return None
        whole = self.output.prediction
        if tensor.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        return int(tensor.storage_offset() - whole.storage_offset()) // whole.stride(0)
