"""What a sample rule is: the decision on each sample of a batch, and the state the decision rests on."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Action(NamedTuple):
    """What a rule may do with a sample besides training it as it is.

    Attributes:
        name: what the rule does, e.g. ``"skip"``.
        column: the ledger's name for how often it did, e.g. ``"skipped"``.
        memory_prone: whether it is a sign of memorization, and counts in the skip ratio and for redistribution.
    """

    name: str
    column: str
    memory_prone: bool = True


SKIP = Action("skip", "skipped")
"""The sample contributes no gradient."""
AUGMENT = Action("augment", "augmented")
"""The sample contributes no gradient and joins the queue of samples to be trained from an augmented copy."""


def shares_text(actions: Iterable[Action], values: Mapping[str, Any]) -> str:
    """Return the share of samples that each action met, empty without actions.

    Args:
        actions: of a sample rule.
        values: has the share, in [0, 1], under ``<column>_fraction`` for each action.

    >>> shares_text((SKIP, AUGMENT), {"skipped_fraction": 0.012, "augmented_fraction": 0.003})
    '1.2% skipped, 0.3% augmented'
    """
    return ", ".join(f"{values[f'{action.column}_fraction']:.1%} {action.column}" for action in actions)


class Decision(NamedTuple):
    """A rule's decision on a batch, on the device of the losses.

    Attributes:
        weights: (B,) float in [0, 1], the factor of each sample's gradient.
        actions: (B,) int64, 0 for a clean update, ``i`` for ``rule.actions[i - 1]``.
        loss_ratio: (B,) float, the score behind the decision: the loss over what is normal for it, inf where no
            decision is due.
    """

    weights: Tensor
    actions: Tensor
    loss_ratio: Tensor

    @classmethod
    def clean(cls, losses: Tensor) -> "Decision":
        """Return the decision to train every sample as it is."""
        ratio = torch.full_like(losses.detach(), torch.inf, dtype=torch.float32)
        return cls(torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.int64), ratio)


class SampleRule(ABC):
    """Decides what becomes of each sample's gradient.

    One instance per proxy. ``decide`` is called with each batch before ``update``, so that a batch is judged by what
    came before it. A rule keeps its state in tensors that ``tensors`` returns by name; whoever saves, restores or
    exchanges rules does so through them. Register a rule by ``register_rule``; docs/rules.md shows a whole one.

    Attributes:
        actions: what the rule may do besides a clean update; the ledger counts, and the records show, each of them.
    """

    actions: ClassVar[tuple[Action, ...]] = (SKIP,)

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any, *, num_timesteps: int, device: torch.device | str) -> "SampleRule":
        """Return a new rule with the settings of a ``GuardConfig``."""

    def is_held_back(self, sample_ids: Tensor) -> Tensor:
        """Return which samples never contribute a gradient, (B,) bool on the CPU: by default none.

        They show what the loss is on images that are not trained on.

        Args:
            sample_ids: (B,) int64, as those of ``decide``.
        """
        return torch.zeros_like(sample_ids, dtype=torch.bool)

    @abstractmethod
    def decide(self, losses: Tensor, timesteps: Tensor, sample_ids: Tensor | None) -> Decision:
        """Return the decision on a batch, changing nothing.

        Args:
            losses: (B,) float, per-sample losses before any weight; no gradient flows back through a decision.
            timesteps: (B,) int64.
            sample_ids: (B,) int64 on the CPU, near-duplicates under the lowest id of their group; None where the loop
                has none.
        """

    def update(self, losses: Tensor, timesteps: Tensor, sample_ids: Tensor | None) -> None:  # noqa: B027 (optional)
        """Take a batch in after it was decided on; see ``decide``."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name: the rule's own tensors, which are written to in place when a state is restored."""
        return {}

    def curves(self) -> dict[str, Tensor]:
        """Return what is worth plotting against the timestep, (num_timesteps,) each."""
        return {}

    def summary(self) -> dict[str, float | None]:
        """Return numbers for the record of a round."""
        return {}

    def to(self, device: torch.device | str) -> "SampleRule":
        """Move the state to a device and return the rule."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the kind of the rule and its tensors."""
        return {"kind": type(self).__name__, **self.tensors()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a saved state of another kind or shape.

        Raises:
            ValueError: says how the two differ.
        """
        expected = (type(self).__name__, {name: tuple(tensor.shape) for name, tensor in self.tensors().items()})
        found = (state["kind"], {name: tuple(tensor.shape) for name, tensor in state.items() if name != "kind"})
        if found != expected:
            raise ValueError(f"this rule is {expected[0]} {expected[1]}, the saved one is {found[0]} {found[1]}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state, after ``check_state``."""
        self.check_state(state)
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])
