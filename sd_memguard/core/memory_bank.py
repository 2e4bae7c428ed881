"""AGC: the memory bank, a running mean of the per-sample loss at each timestep (arXiv 2407.15328, section 4.2)."""

from typing import Any, Literal

import torch
from torch import Tensor

BankMode = Literal["paper", "corrected", "smoothed"]

SMOOTHING_RADIUS = 20
"""Half width, in timesteps, of the window of the smoothed bank."""
MIN_TIMES_SEEN = {"paper": 0, "corrected": 3, "smoothed": 5}
"""Times seen below which no decision is due: of the timestep itself, or effective (decayed) ones of the window."""


class LossMemoryBank:
    """Running mean of the loss at each timestep, and the loss ratio against it.

    1) A batch is first compared with the bank as it stands: ``loss_ratio``.
    2) Then every sample of it, skipped ones too, updates the bank in batch order: ``m[t] <- d m[t] + (1 - d) loss``,
       kept as a decayed sum of losses (``m = (1 - d) sum``) beside the decayed count of samples.

    Modes: ``paper`` starts at 0 as the authors' code does, so that a timestep rarely skips the first times it is seen;
    ``corrected`` divides by ``1 - d^n`` after n samples; ``smoothed`` (ours) divides decayed sums of losses by decayed
    counts, both summed over ``t +- 20``, since at batch size 8 a timestep out of 1000 is seen every 125 steps only.

    Args:
        num_timesteps: number of timesteps of the noise schedule.
        decay: ``d`` above, in [0, 1).
        mode: see above.
        device: where the bank lives.

    >>> bank = LossMemoryBank(num_timesteps=4, mode="paper")
    >>> bank.update(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
    >>> bank.mean(torch.tensor([0, 1]))
    tensor([0.0000, 0.5600])
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        decay: float = 0.8,
        mode: BankMode = "smoothed",
        device: torch.device | str = "cpu",
    ) -> None:
        if mode not in MIN_TIMES_SEEN:
            raise ValueError(f"`mode` must be one of {', '.join(MIN_TIMES_SEEN)}, got {mode!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be at least 0 and below 1, got {decay}")
        self.num_timesteps, self.decay, self.mode = num_timesteps, decay, mode
        self.sums = torch.zeros(num_timesteps, device=device)
        self.counts = torch.zeros(num_timesteps, device=device)
        self.times_seen = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    def to(self, device: torch.device | str) -> "LossMemoryBank":
        """Move the bank to a device and return it."""
        self.sums, self.counts, self.times_seen = (x.to(device) for x in (self.sums, self.counts, self.times_seen))
        return self

    def mean(self, timesteps: Tensor) -> Tensor:
        """Return the mean loss at timesteps, (B,) float32; NaN where never seen, except in paper mode: 0."""
        if self.mode == "paper":
            return (1 - self.decay) * self.sums[timesteps]
        sums, counts = (self._window(x, timesteps) for x in (self.sums, self.counts))
        return sums / counts

    def curve(self) -> Tensor:
        """Return the mean loss at every timestep, (T,) float32, NaN where it was never seen (in paper mode, too)."""
        mean = self.mean(torch.arange(self.num_timesteps, device=self.times_seen.device))
        return torch.where(self.times_seen > 0, mean, torch.nan) if self.mode == "paper" else mean

    def loss_ratio(self, timesteps: Tensor, losses: Tensor) -> Tensor:
        """Return loss / bank value at its timestep, (B,) float32; inf where no decision is due yet.

        Args:
            timesteps: (B,) int64.
            losses: (B,) float, per-sample losses before any weight.
        """
        mean = self.mean(timesteps)
        ratio = losses.detach().float() / mean
        due = (mean > 0) & (self._effective_times_seen(timesteps) >= MIN_TIMES_SEEN[self.mode])
        return torch.where(due, ratio, torch.inf)

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Take a batch in, in batch order; losses that are not finite are ignored.

        The closed form of the sequential rule: a loss that is followed by ``n`` more at its timestep in the same batch
        counts ``d^n``.

        Args:
            timesteps: (B,) int64, repeated ones allowed.
            losses: (B,) float.
        """
        # Masked rather than picked out: to pick, the host would have to wait for the device.
        finite = torch.isfinite(losses)
        losses = torch.where(finite, losses.detach().float(), 0.0)
        same = (timesteps[:, None] == timesteps[None, :]) & finite
        followers = torch.triu(same, diagonal=1).sum(dim=1)
        share = self.decay ** followers.float() * finite
        seen = torch.zeros_like(self.times_seen).index_add_(0, timesteps, finite.long())
        fade = self.decay ** seen.float()
        # Not by `index_add_`, which on CUDA adds in no fixed order: processes that share a batch decide each for
        # itself, and must decide the same. Samples of one timestep write the same sum: their order does not matter.
        for values, added in ((self.sums, share * losses), (self.counts, share)):
            values.mul_(fade)
            values[timesteps] = values[timesteps] + (same * added).sum(dim=1)
        self.times_seen.add_(seen)

    def _window(self, values: Tensor, timesteps: Tensor) -> Tensor:
        if self.mode != "smoothed":
            return values[timesteps]
        offsets = torch.arange(-SMOOTHING_RADIUS, SMOOTHING_RADIUS + 1, device=timesteps.device)
        around = timesteps[:, None] + offsets
        inside = (around >= 0) & (around < self.num_timesteps)
        return (values[around.clamp(0, self.num_timesteps - 1)] * inside).sum(dim=1)

    def _effective_times_seen(self, timesteps: Tensor) -> Tensor:
        if self.mode == "smoothed":
            return self._window(self.counts, timesteps)
        return self.times_seen[timesteps]

    def state_dict(self) -> dict[str, Any]:
        """Return the bank: its kind (format, mode, decay) and its three tensors."""
        return {
            "kind": f"LossMemoryBank-1/{self.mode}/{self.decay}",
            "sums": self.sums,
            "counts": self.counts,
            "times_seen": self.times_seen,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a saved bank of another format, mode, decay or number of timesteps.

        Raises:
            ValueError: says which one it is.
        """
        expected = (f"LossMemoryBank-1/{self.mode}/{self.decay}", tuple(self.sums.shape))
        found = (state["kind"], tuple(state["sums"].shape))
        if found != expected:
            raise ValueError(f"this memory bank is {expected[0]} {expected[1]}, the saved one is {found[0]} {found[1]}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved bank, after ``check_state``."""
        self.check_state(state)
        for name in ("sums", "counts", "times_seen"):
            getattr(self, name).copy_(state[name])
