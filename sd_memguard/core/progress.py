"""What a run has done so far: plain numbers that a checkpoint keeps as JSON."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sd_memguard.core.sampler import ShardSampler

if TYPE_CHECKING:
    from sd_memguard.core.decision import Verdict


@dataclass
class ShardMeter:
    """Sums over one shard's steps in the present round."""

    steps: int = 0
    visits: int = 0
    finite: int = 0
    loss_sum: float = 0.0
    skipped: int = 0
    augmented: int = 0

    def record(self, verdict: "Verdict") -> None:
        """Add one batch."""
        losses = verdict.losses[verdict.losses.isfinite()]
        self.visits += len(verdict.losses)
        self.finite += len(losses)
        self.loss_sum += float(losses.double().sum())
        self.skipped += verdict.num_skipped
        self.augmented += verdict.num_augmented

    def summary(self) -> dict[str, float | int | None]:
        """Return steps, mean of the finite losses and the two fractions; None where there is nothing to divide by."""
        return {
            "steps": self.steps,
            "loss": self.loss_sum / self.finite if self.finite else None,
            "skipped_fraction": self.skipped / self.visits if self.visits else None,
            "augmented_fraction": self.augmented / self.visits if self.visits else None,
        }


@dataclass
class Progress:
    """Where a run stands.

    ``global_step`` counts optimizer steps of the schedule over all proxies, also those not taken because no sample was
    clean (``empty_steps``) or a number was not finite (``nonfinite_steps``); ``extra_steps`` are those of augmented
    batches, outside the schedule. ``unreadable_samples`` were to images that could not be read any more.
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
