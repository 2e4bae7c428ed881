"""Anchored AGC: what is normal is learned from images that are held back, so that it does not move with memorization.

AGC compares a sample with the running mean of the *training* losses, memorized ones included. Where all images are
memorized evenly, ratios stay near 1 and it skips nothing; where losses differ between images, it skips those that are
easy for everybody. Here the mean is that of anchors, a small share of the images that give no gradient, and the
threshold is a quantile of the anchors' own ratios: at first about that quantile of the samples is skipped, more only as
training images become more familiar than images of the same kind that the model has not been trained on.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sd_memguard.core.memory_bank import LossMemoryBank
from sd_memguard.core.rules.base import SKIP, Action, Decision, SampleRule
from sd_memguard.core.rules.registry import register_rule

HOLD_BACK = Action("hold back", "held_back", memory_prone=False)
"""The sample is an anchor and never contributes a gradient."""

NUM_RATIOS, NUM_BANDS, MIN_RATIOS = 512, 5, 20
"""Ratios of anchors that are remembered, bands of timesteps with a quantile each, and ratios that one needs."""
HASH, HASH_RANGE = 2654435761, 2**32
"""Knuth's multiplicative hash: of consecutive ids it picks evenly spread ones."""


@register_rule("anchored")
class AnchoredControl(SampleRule):
    """Skips what is more familiar than nearly all of the held-back images.

    With ``h`` the running mean of the anchors' losses at each timestep, and ``r = loss / h[t]``:

    1. An anchor is held back: no gradient, ever. Its loss updates ``h``, its ratio the quantiles.
    2. ``r`` below the ``quantile`` of the anchors' last 512 ratios in that fifth of the timesteps: skip.
    3. otherwise: a clean update.

    Args:
        num_timesteps: number of timesteps of the noise schedule.
        fraction: share of the images that are anchors.
        quantile: share of the anchors below whose ratio a sample is skipped.
        decay: of the running mean.
        device: where the state lives.
    """

    actions: ClassVar[tuple[Action, ...]] = (SKIP, HOLD_BACK)

    def __init__(
        self,
        num_timesteps: int,
        fraction: float = 0.05,
        quantile: float = 0.05,
        decay: float = 0.8,
        device: torch.device | str = "cpu",
    ) -> None:
        self.fraction, self.quantile = fraction, quantile
        self.bank = LossMemoryBank(num_timesteps, decay, "smoothed", device)
        self.ratios = torch.full((NUM_RATIOS,), torch.nan, device=device)
        self.bands = torch.zeros(NUM_RATIOS, dtype=torch.int64, device=device)
        self.num_ratios = torch.zeros((), dtype=torch.int64)  # on the CPU: it says where to write

    @classmethod
    def from_config(cls, config: Any, *, num_timesteps: int, device: torch.device | str) -> "AnchoredControl":
        """Return the rule of a ``GuardConfig``."""
        return cls(num_timesteps, config.anchor_fraction, config.skip_quantile, config.bank_decay, device)

    def is_held_back(self, sample_ids: Tensor) -> Tensor:
        """Return which samples are held back, (B,) bool on the CPU; the same ones in every run and every shard.

        >>> int(AnchoredControl(1000).is_held_back(torch.arange(1000)).sum())
        50
        """
        return sample_ids * HASH % HASH_RANGE < self.fraction * HASH_RANGE

    def decide(self, losses: Tensor, timesteps: Tensor, sample_ids: Tensor | None) -> Decision:
        """Return the decision on a batch; see ``SampleRule.decide``.

        Raises:
            ValueError: the samples have no ids, so that none can be held back.
        """
        anchors = self._anchors(sample_ids).to(losses.device)
        loss_ratio = self.bank.loss_ratio(timesteps, losses)
        skipped = (loss_ratio < self.thresholds(timesteps)) & ~anchors
        return Decision((~skipped & ~anchors).float(), skipped + 2 * anchors.long(), loss_ratio)

    def thresholds(self, timesteps: Tensor) -> Tensor:
        """Return the ratio below which a sample is skipped at each timestep, (B,); 0 where no decision is due."""
        bands = torch.arange(NUM_BANDS, device=self.ratios.device)
        of_band = torch.where(self.bands == bands[:, None], self.ratios, torch.nan)
        quantiles = of_band.nanquantile(self.quantile, dim=1)
        due = of_band.isfinite().sum(dim=1) >= MIN_RATIOS
        return torch.where(due, quantiles, 0.0)[self._band(timesteps)]

    def update(self, losses: Tensor, timesteps: Tensor, sample_ids: Tensor | None) -> None:
        """Take the anchors of a batch in; other samples leave no trace."""
        chosen = self._anchors(sample_ids).nonzero().flatten()
        if not len(chosen):
            return
        chosen = chosen.to(losses.device)
        losses, timesteps = losses[chosen], timesteps[chosen]
        ratios = self.bank.loss_ratio(timesteps, losses)
        places = (int(self.num_ratios) + torch.arange(len(chosen))) % NUM_RATIOS
        places = places.to(self.ratios.device)
        self.ratios[places] = torch.where(ratios.isfinite(), ratios, torch.nan)
        self.bands[places] = self._band(timesteps)
        self.num_ratios += len(chosen)
        self.bank.update(timesteps, losses)

    def _anchors(self, sample_ids: Tensor | None) -> Tensor:
        if sample_ids is None:
            raise ValueError(
                "the sample rule `anchored` needs sample ids; give `num_samples`, or set `sample_rule='agc'`"
            )
        return self.is_held_back(sample_ids)

    def _band(self, timesteps: Tensor) -> Tensor:
        return timesteps * NUM_BANDS // self.bank.num_timesteps

    def tensors(self) -> dict[str, Tensor]:
        """Return the bank, the anchors' ratios with their bands of timesteps, and how many there were."""
        bank = {"sums": self.bank.sums, "counts": self.bank.counts, "times_seen": self.bank.times_seen}
        return {**bank, "ratios": self.ratios, "bands": self.bands, "num_ratios": self.num_ratios}

    def curves(self) -> dict[str, Tensor]:
        """Return the anchors' mean loss at every timestep, NaN where never seen, and how often it was seen."""
        return {"mean": self.bank.curve(), "times_seen": self.bank.times_seen}

    def summary(self) -> dict[str, float | None]:
        """Return the mean of the bank over the timesteps it knows, and the share of timesteps with a threshold."""
        curve = self.bank.curve()
        known = curve[curve.isfinite()]
        timesteps = torch.arange(len(curve), device=curve.device)
        return {
            "bank_mean": float(known.cpu().double().mean()) if len(known) else None,
            "bank_coverage": float((self.thresholds(timesteps) > 0).cpu().double().mean()),
        }

    def to(self, device: torch.device | str) -> "AnchoredControl":
        """Move the state."""
        self.bank.to(device)
        self.ratios, self.bands = self.ratios.to(device), self.bands.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the kind of the rule with its settings, and its tensors."""
        return {"kind": self._kind, **self.tensors()}

    @property
    def _kind(self) -> str:
        return f"AnchoredControl-1/{self.fraction}/{self.quantile}/{self.bank.decay}"

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another rule, of other settings or another number of timesteps."""
        expected, found = (self._kind, len(self.bank.sums)), (state["kind"], len(state["sums"]))
        if found != expected:
            raise ValueError(f"this sample rule is {expected[0]} {expected[1]}, the saved one is {found[0]} {found[1]}")
