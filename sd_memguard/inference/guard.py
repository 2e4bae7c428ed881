"""What a guard at inference is: hooks on the UNet for the time of one call of the pipeline."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sd_memguard.errors import UserError


@dataclass
class Generation:
    """One call of a pipeline.

    Attributes:
        pipeline: A Stable Diffusion or Stable Diffusion XL pipeline of diffusers.
        token_counts: Tokens of each prompt, begin and end token included; None where the caller gave embeddings.
        is_half: Whether a guard itself is asking the UNet for conditional rows alone.
    """

    pipeline: Any
    token_counts: list[int] | None
    is_half: bool = False

    @property
    def unet(self) -> nn.Module:
        """The pipeline's denoiser."""
        unet = self.pipeline.unet
        assert isinstance(unet, nn.Module)
        return unet

    @property
    def is_guided(self) -> bool:
        """Whether the pipeline, which is running, asks the UNet for both predictions: unconditional rows come first."""
        return bool(self.pipeline.do_classifier_free_guidance)

    def conditional_rows(self, batch: Tensor) -> Tensor:
        """Return the view of a batch that meets the UNet with those rows that have a prompt."""
        return batch.chunk(2)[1] if self.is_guided and not self.is_half else batch

    def require_guidance(self, guard: str) -> None:
        """Raise a ``UserError`` where there is no classifier-free guidance for a guard to act on."""
        if not self.is_guided:
            raise UserError(
                f"{guard} changes classifier-free guidance, which needs `guidance_scale` above 1 and a UNet that is "
                f"not distilled, got guidance_scale={self.pipeline.guidance_scale}; raise it, or use AttentionRescaling"
            )


class InferenceGuard(ABC):
    """A measure against replication that works while generating; an instance holds its settings and no state."""

    @abstractmethod
    def attach(self, generation: Generation) -> AbstractContextManager[None]:
        """Return a context in which the pipeline's UNet is guarded; afterwards it is as it was before."""


@contextmanager
def removed_afterwards(*handles: Any) -> Iterator[None]:
    """Remove the handles of hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
