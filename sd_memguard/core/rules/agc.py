"""AGC and TAA: samples whose loss is abnormally low for their timestep (arXiv 2407.15328, 4.2; arXiv 2502.09434)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sd_memguard.core.bands import classify
from sd_memguard.core.memory_bank import LossMemoryBank
from sd_memguard.core.rules.base import AUGMENT, SKIP, Action, Decision, SampleRule
from sd_memguard.core.rules.registry import register_rule


@register_rule("agc")
class AntiGradientControl(SampleRule):
    """Anti-gradient control, with threshold-aware augmentation where an augment threshold is set.

    With ``r`` the loss over the memory bank's mean at the sample's timestep:

    1. ``r < skip_threshold``: skip.
    2. ``skip_threshold <= r < augment_threshold``: no gradient from the clean image, an augmented copy later.
    3. otherwise: a clean update.
    4. Every sample of the batch, skipped ones too, then updates the bank.

    Args:
        bank: the running mean of the loss at each timestep.
        skip_threshold: 0 skips none.
        augment_threshold: at most ``skip_threshold``: two bands.
    """

    actions: ClassVar[tuple[Action, ...]] = (SKIP, AUGMENT)

    def __init__(self, bank: LossMemoryBank, skip_threshold: float, augment_threshold: float = 0.0) -> None:
        self.bank, self.skip_threshold, self.augment_threshold = bank, skip_threshold, augment_threshold

    @classmethod
    def from_config(cls, config: Any, *, num_timesteps: int, device: torch.device | str) -> "AntiGradientControl":
        """Return the rule of a ``GuardConfig``."""
        bank = LossMemoryBank(num_timesteps, config.bank_decay, config.bank_mode, device)
        return cls(bank, config.skip_threshold, config.augment_threshold)

    def decide(self, losses: Tensor, timesteps: Tensor, sample_ids: Tensor | None) -> Decision:
        """Return the band of each sample; see ``SampleRule.decide``."""
        loss_ratio = self.bank.loss_ratio(timesteps, losses)
        bands = classify(loss_ratio, self.skip_threshold, self.augment_threshold)
        return Decision(bands.clean_mask.float(), bands.skip_mask + 2 * bands.augment_mask.long(), loss_ratio)

    def update(self, losses: Tensor, timesteps: Tensor, sample_ids: Tensor | None) -> None:
        """Update the bank with every sample of a batch."""
        self.bank.update(timesteps, losses)

    def tensors(self) -> dict[str, Tensor]:
        """Return the bank's decayed sums of losses and counts, and how often each timestep was seen, (T,) each."""
        return {"sums": self.bank.sums, "counts": self.bank.counts, "times_seen": self.bank.times_seen}

    def curves(self) -> dict[str, Tensor]:
        """Return the bank's mean loss at every timestep (NaN where never seen, in paper mode, too) and times seen."""
        return {"mean": self.bank.curve(), "times_seen": self.bank.times_seen}

    def summary(self) -> dict[str, float | None]:
        """Return the mean of the bank over the timesteps it knows, and the share of timesteps it decides on."""
        curve = self.bank.curve()
        known = curve[curve.isfinite()]
        ratio = self.bank.loss_ratio(torch.arange(len(curve), device=curve.device), torch.ones_like(curve))
        return {
            "bank_mean": float(known.cpu().double().mean()) if len(known) else None,
            "bank_coverage": float(ratio.isfinite().cpu().double().mean()),
        }

    def to(self, device: torch.device | str) -> "AntiGradientControl":
        """Move the bank."""
        self.bank.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the bank's state."""
        return self.bank.state_dict()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of a bank of another format, mode, decay or number of timesteps."""
        self.bank.check_state(dict(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a bank."""
        self.bank.load_state_dict(dict(state))
