"""Cross-attention led back to the beginning of the prompt (Ren et al. 2024)."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sd_memguard.errors import UserError
from sd_memguard.inference.guard import Generation, InferenceGuard, removed_afterwards


@dataclass(frozen=True)
class AttentionRescaling(InferenceGuard):
    """Cross-attention without the summary tokens, and with more weight on the begin token.

    Ren et al. 2024, "Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention"
    (ECCV, arXiv 2403.11052), section 5.2: where an image is memorized, attention is concentrated on few tokens, mostly
    on those behind the prompt. In ``softmax(q k^T / sqrt(d))`` of the conditional rows, the logits of the end token and
    of the padding become -infinity, and those of the begin token are multiplied by ``factor``. Here the begin token's
    key is multiplied, which is the same and leaves the attention's implementation alone.

    Args:
        factor: At least 1; the authors take 1.25. Measured in docs/inference.md.
    """

    factor: float = 1.25

    def __post_init__(self) -> None:
        """Check the settings."""
        if not self.factor >= 1:
            raise UserError(f"`factor` of attention rescaling must be at least 1, got {self.factor}; 1 leaves logits")

    def attach(self, generation: Generation) -> AbstractContextManager[None]:
        """Return a context in which the UNet is guarded.

        Raises:
            UserError: Where the prompts' tokens are not known, or projections are fused.
        """
        counts = generation.token_counts
        if counts is None:
            raise UserError("AttentionRescaling must know the tokens: give `prompt` instead of `prompt_embeds`")
        unet = generation.unet
        cross = [module for name, module in unet.named_modules() if name.split(".")[-1] == "attn2"]
        if any(getattr(module, "fused_projections", False) for module in cross):
            raise UserError("AttentionRescaling needs keys of their own; call `unfuse_qkv_projections()` first")

        def rescale(projection: nn.Module, args: tuple[Any, ...], keys: Tensor) -> Tensor:
            generation.conditional_rows(keys)[:, 0] *= self.factor
            return keys

        def mask(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            states = kwargs["encoder_hidden_states"]
            kept = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            rows = generation.conditional_rows(kept)
            length = torch.tensor(counts, device=states.device) - 1
            # Several images of a prompt are neighbouring rows.
            length = length.repeat_interleave(len(rows) // len(counts))
            rows &= torch.arange(states.shape[1], device=states.device) < length[:, None]
            return args, {**kwargs, "encoder_attention_mask": kept}

        hooks = [module.to_k.register_forward_hook(rescale) for module in cross]
        # Before the hooks of other guards, which may ask the UNet themselves.
        return removed_afterwards(*hooks, unet.register_forward_pre_hook(mask, with_kwargs=True, prepend=True))
