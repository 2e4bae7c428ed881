"""What the guard decided on one batch: on the device at once, on the host when it is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sd_memguard.core.async_copy import AsyncCPUCopy
from sd_memguard.core.rules.base import AUGMENT, SKIP, Action, Decision


class HostDecision(NamedTuple):
    """A decided batch on the CPU, (B,) each: losses, loss ratios, gradient weights float32, and actions int64."""

    losses: Tensor
    loss_ratio: Tensor
    weights: Tensor
    actions: Tensor


class DecisionCopy:
    """A decision on its way to the host, in one transfer.

    Args:
        losses: (B,) float, as they were judged.
        decision: of the rule.
    """

    def __init__(self, losses: Tensor, decision: Decision) -> None:
        columns = (losses.detach(), decision.loss_ratio, decision.weights, decision.actions)
        self._copy = AsyncCPUCopy(torch.stack([column.float() for column in columns]))

    @cached_property
    def host(self) -> HostDecision:
        """The decision on the host; the first to ask waits for the device."""
        losses, loss_ratio, weights, actions = self._copy.wait()
        return HostDecision(losses, loss_ratio, weights, actions.long())


@dataclass(frozen=True)
class Verdict:
    """What the guard decided on one batch. Reading it changes nothing.

    The tensors are on the device of the losses; the numbers and ``losses`` are on the host, and the first of them to be
    read waits for the device.

    Attributes:
        loss: scalar with graph, what to backward: the mean of the weighted losses over the clean samples (0 with none).
            In an attached loop that accumulates, the gradient of a step comes out as the mean over all its batches.
        loss_sum: scalar with graph, the sum that ``loss`` is the mean of, for loops that divide for themselves.
        loss_ratio: (B,) loss over what is normal at its timestep, inf where no decision is due.
        weights: (B,) factor of each sample's gradient, in [0, 1].
        actions: (B,) int64, 0 for a clean update, ``i`` for the rule's ``i``-th action.
    """

    loss: Tensor
    loss_sum: Tensor
    loss_ratio: Tensor
    weights: Tensor
    actions: Tensor
    _rule_actions: tuple[Action, ...]
    _copy: DecisionCopy

    def mask(self, action: Action) -> Tensor:
        """Return where an action was taken, (B,) bool; nowhere for one that the rule does not have."""
        if action not in self._rule_actions:
            return torch.zeros_like(self.actions, dtype=torch.bool)
        return self.actions == self._rule_actions.index(action) + 1

    @property
    def skip_mask(self) -> Tensor:
        """(B,) bool, True where skipped."""
        return self.mask(SKIP)

    @property
    def augment_mask(self) -> Tensor:
        """(B,) bool, True where the sample waits to be trained from an augmented copy."""
        return self.mask(AUGMENT)

    @property
    def host(self) -> HostDecision:
        """The decision on the host."""
        return self._copy.host

    @property
    def losses(self) -> Tensor:
        """(B,) float32 on the CPU, the losses as they were judged."""
        return self.host.losses

    @property
    def num_clean(self) -> int:
        """Number of samples with a gradient; with 0 no optimizer step should be taken."""
        return int((self.host.weights > 0).sum())

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each action of the rule was taken, by the ledger's name for it."""
        return count_actions(self.host.actions, self._rule_actions)

    @property
    def num_skipped(self) -> int:
        """Number of skipped samples."""
        return self.counts.get(SKIP.column, 0)

    @property
    def num_augmented(self) -> int:
        """Number of samples to augment."""
        return self.counts.get(AUGMENT.column, 0)


def count_actions(actions: Tensor, rule_actions: tuple[Action, ...]) -> dict[str, int]:
    """Return how often each of a rule's actions was taken, by its column."""
    return {action.column: int((actions == index).sum()) for index, action in enumerate(rule_actions, start=1)}
