"""Prompt embeddings moved to where they lead to no memorized image (Wen et al. 2024)."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sd_memguard.errors import UserError
from sd_memguard.inference.guard import Generation, InferenceGuard, removed_afterwards


@dataclass(frozen=True)
class PromptAdjustment(InferenceGuard):
    """The prompt's embeddings, changed before the first step until they steer it less.

    Wen et al. 2024, "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR, arXiv 2407.21720),
    section 4.3: at the first step, ``L(e) = || eps(x_T, e) - eps(x_T, e_0) ||``, which is large for memorized prompts,
    is minimized over the embeddings e by AdamW, until it is at most the target; the begin token stays as it is. Each
    image has its own noise and so its own embeddings. With Stable Diffusion XL the pooled embedding stays as it is.

    Args:
        target: Of L, for latents of 4 x 64 x 64 as those of Stable Diffusion 1; for other sizes it is scaled by the
            square root of the number of elements. The authors try 1 to 5. Measured in docs/inference.md.
        learning_rate: Of AdamW; 0.05 in the authors' script.
        num_steps: Most steps, each a forward and backward of the UNet; 10 in the authors' script.
    """

    target: float = 2.0
    learning_rate: float = 0.05
    num_steps: int = 10

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("target", "learning_rate", "num_steps"):
            if not getattr(self, name) > 0:
                raise UserError(f"`{name}` of prompt adjustment must be above 0, got {getattr(self, name)}")

    def attach(self, generation: Generation) -> AbstractContextManager[None]:
        """Return a context in which the UNet is guarded."""
        change: list[Tensor] = []

        def adjust(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            generation.require_guidance(type(self).__name__)
            if torch.is_inference_mode_enabled():
                raise UserError("PromptAdjustment needs gradients; leave `torch.inference_mode`, use `torch.no_grad`")
            states = kwargs["encoder_hidden_states"]
            without, conditional = states.chunk(2)
            if not change:
                change.append(self._find_change(generation, args, kwargs))
            return args, {**kwargs, "encoder_hidden_states": torch.cat([without, conditional + change[0]])}

        return removed_afterwards(generation.unet.register_forward_pre_hook(adjust, with_kwargs=True))

    def _find_change(self, generation: Generation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return what to add to the conditional embeddings, (B, T, D), from the arguments of the first step."""
        unet, conditional = generation.unet, kwargs["encoder_hidden_states"].chunk(2)[1]
        # Past the UNet's own hooks, which are about the pipeline's calls.
        with torch.no_grad():
            unconditional = unet.forward(*args, **kwargs)[0].chunk(2)[0].float()
        half_args, half_kwargs = _conditional_rows((args, kwargs), len(kwargs["encoder_hidden_states"]))
        target = self.target * (unconditional[0].numel() / (4 * 64 * 64)) ** 0.5
        change = torch.zeros_like(conditional, dtype=torch.float32, requires_grad=True)
        optimizer = torch.optim.AdamW([change], lr=self.learning_rate, weight_decay=0.0)
        generation.is_half = True
        for _ in range(self.num_steps):
            with torch.enable_grad():
                states = (conditional + change).to(conditional.dtype)
                predicted = unet.forward(*half_args, **{**half_kwargs, "encoder_hidden_states": states})[0]
                norms = (predicted.float() - unconditional).flatten(1).norm(dim=1)
                (gradient,) = torch.autograd.grad(norms.sum(), change)
            pending = norms.detach() > target
            if not pending.any():
                break
            before = change.detach().clone()
            gradient[:, 0] = 0
            change.grad = gradient
            optimizer.step()
            with torch.no_grad():
                change[~pending] = before[~pending]
        generation.is_half = False
        return change.detach().to(conditional.dtype)


def _conditional_rows(value: Any, batch_size: int) -> Any:
    """Return arguments of the UNet with the second half of each tensor of that many rows."""
    if isinstance(value, Tensor):
        return value.chunk(2)[1] if value.ndim and len(value) == batch_size else value
    if isinstance(value, dict):
        return {name: _conditional_rows(part, batch_size) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_conditional_rows(part, batch_size) for part in value)
    return value
