"""What a run has done so far: plain numbers that a checkpoint keeps as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from sd_memguard.core.decision import Verdict
from sd_memguard.core.sampler import ShardSampler


@dataclass
class ShardMeter:
    """Sums over one shard's steps in the present round; ``actions`` counts by the ledger's name of an action."""

    steps: int = 0
    seen: int = 0
    finite: int = 0
    loss_sum: float = 0.0
    actions: dict[str, int] = field(default_factory=dict)

    def record(self, verdict: Verdict) -> None:
        """Add one batch."""
        losses = verdict.losses[verdict.losses.isfinite()]
        self.seen += len(verdict.losses)
        self.finite += len(losses)
        self.loss_sum += float(losses.double().sum())
        for column, count in verdict.counts.items():
            self.actions[column] = self.actions.get(column, 0) + count

    def summary(self, columns: list[str]) -> dict[str, float | int | None]:
        """Return steps, mean of the finite losses and the share of each action; None without anything to divide by."""
        fractions = {
            f"{column}_fraction": self.actions.get(column, 0) / self.seen if self.seen else None for column in columns
        }
        return {"steps": self.steps, "loss": self.loss_sum / self.finite if self.finite else None, **fractions}


@dataclass
class Progress:
    """Where a run stands.

    ``global_step`` counts optimizer steps of the schedule over all proxies, also those not taken because no sample was
    clean (``empty_steps``) or a number was not finite (``nonfinite_steps``); ``extra_steps`` are those of augmented
    batches, per shard. ``unreadable_samples`` are those whose image could not be read any more, or whose
    crop missed their mask.
    """

    num_shards: int
    round_index: int = 0
    shard_index: int = 0
    step_in_round: int = 0
    global_step: int = 0
    empty_steps: int = 0
    nonfinite_steps: int = 0
    unreadable_samples: int = 0
    image_forwards: int = 0
    shard_steps: list[int] = field(default_factory=list)
    extra_steps: list[int] = field(default_factory=list)
    samplers: list[ShardSampler] = field(default_factory=list)
    meters: list[ShardMeter] = field(default_factory=list)
    round_extra_steps: int = 0

    def __post_init__(self) -> None:
        """Begin where nothing was restored."""
        self.shard_steps = self.shard_steps or [0] * self.num_shards
        self.extra_steps = self.extra_steps or [0] * self.num_shards
        self.samplers = self.samplers or [ShardSampler(shard_index) for shard_index in range(self.num_shards)]
        self.meters = self.meters or [ShardMeter() for _ in range(self.num_shards)]

    def begin_round(self) -> None:
        """Move on to the next round."""
        self.round_index += 1
        self.shard_index = self.step_in_round = self.round_extra_steps = 0
        self.meters = [ShardMeter() for _ in range(self.num_shards)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Return the progress that ``to_dict`` wrote."""
        samplers = [ShardSampler(**sampler) for sampler in values["samplers"]]
        meters = [ShardMeter(**meter) for meter in values["meters"]]
        return cls(**{**values, "samplers": samplers, "meters": meters})
