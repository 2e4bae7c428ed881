"""Guidance that waits until a generated image has left the attraction basin of a memorized one (Jain et al. 2025)."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sd_memguard.errors import UserError
from sd_memguard.inference.guard import Generation, InferenceGuard, removed_afterwards


@dataclass(frozen=True)
class StaticTransition(InferenceGuard):
    """No classifier-free guidance before a transition point, the usual one from there on.

    Jain et al. 2025, "Classifier-Free Guidance inside the Attraction Basin May Cause Memorization" (CVPR, arXiv
    2411.16738), static transition point: ``eps = eps_0 + s(t) (eps_c - eps_0)``, where ``eps_0`` and ``eps_c`` are the
    unconditional and the conditional prediction, with ``s(t) = 0`` for t above the transition point and the pipeline's
    ``guidance_scale`` below. The authors' script also changes to a schedule of 200 steps at that point; here the
    schedule stays as it is, and the time per image with it.

    Args:
        transition: The point, as a share of the timesteps the model was trained with: 1 is pure noise. The authors
            take 0.5 to 0.7. Measured in docs/inference.md.
    """

    transition: float = 0.7

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_transition(self.transition)

    def attach(self, generation: Generation) -> AbstractContextManager[None]:
        """Return a context in which the UNet is guarded."""
        return _scaled_guidance(generation, type(self).__name__, self.transition, 0.0)


@dataclass(frozen=True)
class OppositeGuidance(InferenceGuard):
    """Guidance away from the prompt before a transition point, the usual one from there on.

    The same source, opposite guidance: ``s(t) = strength * guidance_scale`` with a negative ``strength`` for t above
    the transition point. It leaves the basin earlier than no guidance does.

    Args:
        transition: The point, as a share of the timesteps the model was trained with; the authors take 0.65.
        strength: Of the early guidance, as a multiple of the pipeline's; at most 0. The authors take -1 with a dynamic
            and -2 / 7.5 with a static transition.
    """

    transition: float = 0.8
    strength: float = -2 / 7.5

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_transition(self.transition)
        if not self.strength <= 0:
            raise UserError(f"`strength` of opposite guidance must be at most 0, got {self.strength}; 0 is none")

    def attach(self, generation: Generation) -> AbstractContextManager[None]:
        """Return a context in which the UNet is guarded."""
        return _scaled_guidance(generation, type(self).__name__, self.transition, self.strength)


def _check_transition(transition: float) -> None:
    if not 0 <= transition <= 1:
        raise UserError(f"`transition` must be a share of the timesteps between 0 and 1, got {transition}; 1 is never")


def _scaled_guidance(
    generation: Generation, guard: str, transition: float, strength: float
) -> AbstractContextManager[None]:
    """Return a context in which guidance is multiplied by ``strength`` at timesteps above the transition point.

    The pipeline computes ``eps_0 + s (eps_c - eps_0)`` of the UNet's output, so the output's conditional half becomes
    ``eps_0 + strength (eps_c - eps_0)``.
    """
    limit = transition * generation.pipeline.scheduler.config.num_train_timesteps

    def scale(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        generation.require_guidance(guard)
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if float(timestep) <= limit:
            return output
        sample: Tensor = output[0]
        without, conditional = sample.chunk(2)
        conditional.copy_(without + strength * (conditional - without))
        return output

    return removed_afterwards(generation.unet.register_forward_hook(scale, with_kwargs=True))
