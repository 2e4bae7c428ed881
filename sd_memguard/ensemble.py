"""The ensemble (IET): turns, rounds, averages and redistribution, for whoever takes the steps.

The trainer pulls it: it asks for the samples of each turn and takes the steps itself. The driver of a foreign loop
pushes it: it tells of each batch and step, and the ensemble says whose turn it is.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sd_memguard.core.decision import Verdict
from sd_memguard.core.progress import Progress
from sd_memguard.core.sampler import BucketsOf, SampleRef
from sd_memguard.core.schedule import RoundSchedule, round_mean
from sd_memguard.core.shards import Moves
from sd_memguard.proxies.full import FullProxies
from sd_memguard.sample_guard import SampleGuard

logger = logging.getLogger(__name__)

Measured = Mapping[str, tuple[float, float]]
"""Losses measured at a round's end by name: mean and standard error."""
PER_ROUND = ("empty_steps", "nonfinite_steps")
"""What ``Progress`` counts from the beginning of the run and a round reports for itself."""


class Ensemble:
    """The proxies of a run and where they stand.

    Args:
        guard: whose shards take turns.
        proxies: the models of the shards.
        schedule: the budget.

    Attributes:
        progress: where the run stands.
        rounds: a row per finished round, as ``memguard/rounds.jsonl`` has them.
        listeners: called with each row.
    """

    def __init__(self, guard: SampleGuard, proxies: FullProxies, schedule: RoundSchedule) -> None:
        self.guard, self.proxies, self.schedule = guard, proxies, schedule
        self.progress = Progress(schedule.num_shards)
        self.rounds: list[dict[str, Any]] = []
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    # A turn: one proxy on its shard, for its steps of the round.

    @property
    def is_finished(self) -> bool:
        """Whether all rounds are over."""
        return self.progress.round_index >= self.schedule.num_rounds

    @property
    def steps_left(self) -> int:
        """Number of steps that the active turn has left."""
        progress = self.progress
        return self.schedule.steps_in_round(progress.round_index, progress.shard_index) - progress.step_in_round

    def begin_turn(self, shard_index: int) -> int:
        """Make a shard's proxy the active one, unless it has no steps left in this round, and return their number."""
        progress = self.progress
        progress.shard_index = shard_index
        # Computed, not remembered: a run that goes on for longer may find its last round unfinished.
        progress.step_in_round = (
            progress.shard_steps[shard_index] - progress.round_index * self.schedule.steps_per_round
        )
        if self.steps_left > 0:
            self.proxies.activate(shard_index)
            self.guard.shard_index = shard_index
        return self.steps_left

    def upcoming(self, batch_size: int, buckets: BucketsOf | None = None) -> Iterator[list[SampleRef]]:
        """Yield the batches of the active shard from where its sampler stands, without end and without moving it.

        Args:
            batch_size: samples of a batch.
            buckets: which samples can share a batch; None: all can.
        """
        shard_index, groups = self.guard.shard_index, self.guard.balanced_groups
        members = self.guard.plan.members(shard_index)
        sampler = self.progress.samplers[shard_index]
        own_groups = None if groups is None else groups[members]
        return sampler.batches(members, batch_size, self.guard.seed, own_groups, buckets)

    def advance(self, count: int) -> None:
        """Count samples that the active shard has given out."""
        shard_index = self.guard.shard_index
        self.progress.samplers[shard_index].advance(count, self.guard.epoch_lengths()[shard_index])

    def record(self, verdict: Verdict) -> None:
        """Count what was decided on a batch of the active shard."""
        self.progress.meters[self.guard.shard_index].record(verdict)

    def count_step(self) -> None:
        """Count an optimizer step of the active proxy, also one that was not taken."""
        progress, shard_index = self.progress, self.guard.shard_index
        progress.shard_steps[shard_index] += 1
        progress.step_in_round += 1
        progress.global_step += 1
        progress.meters[shard_index].steps += 1

    def count_augmented(self) -> None:
        """Count a batch of augmented copies that the active proxy has trained."""
        self.progress.extra_steps[self.guard.shard_index] += 1
        self.progress.round_extra_steps += 1

    # The end of a round.

    def end_round(self, measure: Callable[[], Measured] = dict) -> dict[str, Any]:
        """Average the proxies or move samples between shards, and return the round's row.

        Args:
            measure: called with the proxies as the next round begins with them; what it returns joins the row.
        """
        guard, weights = self.guard, self.guard.aggregation_weights()
        kind, moves, sizes = self.schedule.kind(self.progress.round_index), None, guard.plan.sizes()
        if kind == "average":
            distances = self.proxies.average(weights)
        else:
            distances = self.proxies.distances(weights)
            moves = guard.redistribute()
            for sampler in self.progress.samplers:
                sampler.begin_epoch()
        row = self._row(kind, sizes, distances, moves, measure())
        self.rounds.append(row)
        self.progress.begin_round()
        for listen in self.listeners:
            listen(row)
        return row

    def _row(
        self, kind: str, sizes: list[int], distances: list[float], moves: Moves | None, measured: Measured
    ) -> dict[str, Any]:
        progress, columns = self.progress, [action.column for action in self.guard.actions]
        row: dict[str, Any] = {
            "round": progress.round_index + 1,
            "kind": kind,
            "global_step": progress.global_step,
            "extra_steps": progress.round_extra_steps,
            **{name: getattr(progress, name) - sum(row[name] for row in self.rounds) for name in PER_ROUND},
            "image_forwards": progress.image_forwards,
            "shards": [
                {
                    "shard": k,
                    "size": sizes[k],
                    **meter.summary(columns),
                    "distance": distances[k],
                    **self.guard.rules[k].summary(),
                }
                for k, meter in enumerate(progress.meters)
            ],
            "moves": [] if moves is None else moves.counts(),
        }
        for name, (mean, error) in measured.items():
            row[name], row[f"{name}_error"] = mean, error
        return row

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model holds the weighted mean of the proxies, or of their EMA."""
        return self.proxies.averaged(self.guard.aggregation_weights())

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands, but for the proxies; see ``save_proxies``."""
        return {"progress": self.progress.to_dict(), "guard": self.guard.state_dict(), "rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state, but for the proxies.

        Raises:
            ValueError: it is of another guard; nothing is changed then.
        """
        self.guard.load_state_dict(state["guard"])
        self.progress = Progress.from_dict(state["progress"])
        self.rounds = list(state["rounds"])

    def save_proxies(self, folder: Path) -> dict[str, Any]:
        """Write all proxies to a folder and return their JSON-ready index."""
        return self.proxies.save(folder)

    def load_proxies(self, folder: Path, index: Mapping[str, Any]) -> None:
        """Take over all proxies from a folder written by ``save_proxies``."""
        self.proxies.load(folder, index)


def round_text(row: Mapping[str, Any], num_rounds: int) -> str:
    """Return a round's row as a line of the log."""
    parts = []
    columns = [name for name in row["shards"][0] if name.endswith("_fraction")]
    for name, form in (("loss", ".4f"), *((column, ".0%") for column in columns)):
        if (value := round_mean(row, name)) is not None:
            parts.append(f"{name.removesuffix('_fraction')} {value:{form}}")
    if "heldout_loss" in row:
        parts.append(f"validation loss: train {row['train_loss']:.4f}, held-out {row['heldout_loss']:.4f}")
    if row.get("relative_gap") is not None:
        parts.append(f"relative gap {row['relative_gap']:.0%}")
    if row["kind"] == "redistribute":
        parts.append(f"{sum(move['count'] for move in row['moves'])} samples moved")
    elif len(row["shards"]) > 1:
        parts.append("proxies averaged")
    return f"round {row['round']}/{num_rounds}: {', '.join(parts)}"
