"""Where a guarded loop stands: whose turn it is, what the step under way is made of, and what is due between two.

The loop asks for batches and steps its optimizer; all else follows from these two events. Between the last step of a
turn and the next batch the proxies change places, so that what a loop does after a step (EMA, logs, checkpoints) still
finds the proxy that took it.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sd_memguard.core.progress import Progress
from sd_memguard.core.sampler import SampleRef
from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.core.shards import Moves
from sd_memguard.errors import LoopError
from sd_memguard.plugin.backends import LoopBackend
from sd_memguard.plugin.lr_table import LRTable, learning_rates, set_learning_rates
from sd_memguard.proxies.full import FullProxies

if TYPE_CHECKING:
    from sd_memguard.guard import MemorizationGuard, Verdict

logger = logging.getLogger(__name__)


@dataclass
class Window:
    """The batches since the last optimizer step."""

    batches: int = 0
    weighed: int = 0
    samples: int = 0
    clean: int = 0
    unguarded: int = 0
    factor: float = 1.0
    sample_ids: list[int] = field(default_factory=list)
    augmented: bool = False


class Rounds:
    """Drives the rounds of a loop that somebody else has written.

    Args:
        guard: the guard whose shards take turns.
        proxies: the models of the shards.
        schedule: the budget.
        optimizer: the plain torch optimizer of the loop; its steps are watched by hooks.
        host: the loop.
        lr_table: learning rates of the plain run by its step, where the proxies have to follow them.

    Attributes:
        visits: the addresses of the batch under way; none for copies, nor where the loop keeps its order.
        history: a row per round.
        listeners: called with each row.
    """

    def __init__(
        self,
        guard: "MemorizationGuard",
        proxies: FullProxies,
        schedule: RoundSchedule,
        optimizer: Optimizer,
        host: LoopBackend,
        lr_table: LRTable | None = None,
    ) -> None:
        self.guard, self.proxies, self.schedule, self.optimizer, self.host = guard, proxies, schedule, optimizer, host
        self.lr_table = lr_table
        self.progress = Progress(schedule.num_shards)
        self.window = Window()
        self.visits: list[SampleRef] = []
        self.history: list[dict[str, Any]] = []
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.restore: Callable[[], None] | None = None
        self.batches_seen = self.losses_seen = self.num_restores = self.epoch_position = 0
        self.stepped = True
        self._host_rates: list[float] = []
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        optimizer.register_step_post_hook(lambda *_: self._after_step())

    # The loop asks for a batch.

    @property
    def finished(self) -> bool:
        """Whether all rounds are over."""
        return self.progress.round_index >= self.schedule.num_rounds

    @property
    def turn(self) -> tuple[int, int, int]:
        """Return what changes when the order of the samples that lie ahead does."""
        return (self.guard.shard_index, self.progress.round_index, self.num_restores)

    def settle(self) -> None:
        """Do what is due between two steps: take up a checkpoint, hand over to the next proxy, end the round."""
        if self.restore is not None:
            restore, self.restore = self.restore, None
            restore()
            self.num_restores += 1
        if self.window.batches and self.host.overflowed():
            self.progress.nonfinite_steps += 1
            self._count_step()
        if self.window.batches:
            return
        progress = self.progress
        while not self.finished and self._turn_is_over():
            progress.shard_index, progress.step_in_round = progress.shard_index + 1, 0
            if progress.shard_index == self.schedule.num_shards:
                self._end_round()
        if not self.finished:
            self.proxies.activate(progress.shard_index)
            self.guard.shard_index = progress.shard_index

    def _turn_is_over(self) -> bool:
        progress = self.progress
        return progress.step_in_round == self.schedule.steps_in_round(progress.round_index, progress.shard_index)

    def ahead(self, size: int) -> Iterator[list[SampleRef]]:
        """Yield the batches of the active shard from where its sampler stands, without end and without moving it."""
        shard_index = self.guard.shard_index
        members, sampler = self.guard.plan.members(shard_index), replace(self.progress.samplers[shard_index])
        groups = None if self.guard.balanced_groups is None else self.guard.balanced_groups[members]
        epoch_length = self.guard.num_images()[shard_index]
        while True:
            yield sampler.peek(members, size, self.guard.seed, groups)
            sampler.advance(size, epoch_length)

    def take(self, visits: list[SampleRef]) -> None:
        """Count a batch that goes out to the loop."""
        shard_index = self.guard.shard_index
        self.progress.samplers[shard_index].advance(len(visits), self.guard.num_images()[shard_index])
        self.open_batch([visit.sample_id for visit in visits])
        self.visits = visits

    def open_batch(self, sample_ids: list[int], *, augmented: bool = False) -> None:
        """Begin a batch of these samples; the losses that come next are theirs."""
        self.window.batches += 1
        self.window.sample_ids, self.window.augmented = sample_ids, augmented
        self.visits = []
        self.batches_seen += 1
        if augmented:
            self.progress.extra_steps[self.guard.shard_index] += 1
            self.progress.round_extra_steps += 1

    def on_epoch_end(self) -> None:
        """Hear that the loop has had all batches of an epoch.

        Raises:
            LoopError: it has shown none of their losses.
        """
        if self.batches_seen and not self.losses_seen:
            raise LoopError(
                "an epoch is over and the guard has seen no losses, so that nothing was guarded; call "
                "`guard.weigh(losses, timesteps, batch['sample_id'])` on every batch and backward `verdict.loss`"
            )

    def on_loop_end(self) -> None:
        """Hear that the loop asks for no more batches for now: after its last step it may export the model."""
        self.epoch_position = 0
        if self.progress.global_step >= self.schedule.total_steps:
            self.settle()

    # The loop weighs the losses.

    @property
    def augmented(self) -> bool:
        """Whether the batch under way holds augmented copies."""
        return self.window.augmented

    def check_batch(self, sample_ids: Tensor) -> None:
        """Refuse losses that are not of the batch under way.

        Raises:
            LoopError: the samples are not those that the loader has given out.
        """
        strangers = sorted(set(sample_ids.tolist()) - set(self.window.sample_ids))
        if self.window.batches == 0 or strangers:
            raise LoopError(
                f"`sample_ids` {strangers or sample_ids.tolist()} are not of the batch under way; iterate over the "
                'dataloader that the guard has returned, and give `weigh` its `batch["sample_id"]`'
            )

    def divisor(self, num_samples: int, num_clean: int) -> float:
        """Return what the sum over the clean samples of a batch is divided by.

        The gradient of a step is the mean over the clean samples of all batches of its window, however many they are:
        the gradients so far are rescaled whenever a batch changes the share of clean samples. Where other losses
        share the step (class images), each batch is a mean of its own.
        """
        window = self.window
        window.samples += num_samples
        window.clean += num_clean
        if window.batches == 1 or window.unguarded:
            window.factor = num_samples / max(num_clean, 1)
            return float(max(num_clean, 1))
        before, window.factor = window.factor, window.samples / max(window.clean, 1)
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if before != window.factor and gradients:
            torch._foreach_mul_(gradients, window.factor / before)
        return num_samples / window.factor

    def weighed(self, verdict: "Verdict") -> None:
        """Count a verdict."""
        self.window.weighed = self.window.batches
        self.losses_seen += 1
        self.progress.image_forwards += len(verdict.losses)
        if not self.window.augmented:
            self.progress.meters[self.guard.shard_index].record(verdict)

    # The loop steps its optimizer.

    def _before_step(self) -> None:
        window = self.window
        if window.batches == 0:
            raise LoopError(
                "the optimizer was about to step on a batch that did not come from the guard; iterate over the "
                "dataloader that `prepare` or `attach` returned"
            )
        if window.weighed < window.batches:
            raise LoopError(
                f"the optimizer was about to step, but the guard has not seen the losses of {window.batches} "
                "batch(es): call `guard.weigh(losses, timesteps, batch['sample_id'])` on every batch and backward "
                "`verdict.loss`"
            )
        if self.finished or self.progress.global_step >= self.schedule.total_steps:
            raise LoopError(
                f"the loop goes on after the {self.schedule.total_steps} steps that `total_steps` announced, when the "
                "proxies have been averaged for good; announce as many steps as the loop takes"
            )
        self.stepped = window.clean + window.unguarded > 0
        if not self.stepped:  # a zero gradient would still move the weights, by decay and by momentum
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            self.progress.empty_steps += 1
        if self.lr_table is not None:
            self._host_rates = learning_rates(self.optimizer)
            self._check_rates(self.lr_table)
            plain_step = self.schedule.num_shards * self.progress.shard_steps[self.guard.shard_index]
            set_learning_rates(self.optimizer, self.lr_table[min(plain_step, len(self.lr_table) - 1)])

    def _check_rates(self, lr_table: LRTable) -> None:
        """Refuse a schedule that is not where one step for each step of the optimizer has brought it."""
        step = self.progress.global_step - self.progress.nonfinite_steps  # accelerate does not count those
        expected = lr_table[min(step, len(lr_table) - 1)]
        if any(not math.isclose(a, b, rel_tol=1e-5) for a, b in zip(self._host_rates, expected, strict=True)):
            raise LoopError(
                f"at step {step} the learning rate is {self._host_rates}, where `lr_scheduler` is at {expected} if it "
                "is stepped once after each optimizer step; do so, or leave it out of `prepare` or `attach`, and the "
                "learning rate is the loop's affair"
            )

    def _after_step(self) -> None:
        if self.lr_table is not None:  # the schedule of the loop goes on from its own value
            set_learning_rates(self.optimizer, self._host_rates)
        self._count_step()

    def _count_step(self) -> None:
        progress, shard_index = self.progress, self.guard.shard_index
        progress.shard_steps[shard_index] += 1
        progress.step_in_round += 1
        progress.global_step += 1
        progress.meters[shard_index].steps += 1
        self.window = Window()

    # The end of a round.

    def _end_round(self) -> None:
        guard, weights = self.guard, self.guard.aggregation_weights()
        kind = self.schedule.kind(self.progress.round_index)
        moves = None
        if kind == "average":
            distances = self.proxies.average(weights)
        else:
            distances = self.proxies.distances(weights)
            moves = guard.redistribute()
            for sampler in self.progress.samplers:
                sampler.begin_epoch_of_shard()
        row = self._row(kind, distances, moves)
        self.history.append(row)
        self.progress.begin_round()
        logger.info("%s", round_text(row, self.schedule.num_rounds))
        for listen in self.listeners:
            listen(row)

    def _row(self, kind: str, distances: list[float], moves: Moves | None) -> dict[str, Any]:
        progress, sizes = self.progress, self.guard.plan.sizes()
        return {
            "round": progress.round_index + 1,
            "kind": kind,
            "global_step": progress.global_step,
            "extra_steps": 0,
            "augmented_batches": progress.round_extra_steps,
            "image_forwards": progress.image_forwards,
            "shards": [
                {"shard": k, "size": sizes[k], **meter.summary(), "distance": distances[k]}
                for k, meter in enumerate(progress.meters)
            ],
            "moves": [] if moves is None else moves.counts(),
        }

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return where the loop stands, but for the proxies."""
        if self.window.batches:
            logger.warning(
                "a checkpoint in the middle of a step: the gradients of %d batch(es) are not part of it",
                self.window.batches,
            )
        return {
            "progress": self.progress.to_dict(),
            "epoch_position": self.epoch_position,
            "guard": self.guard.state_dict(),
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state, but for the proxies."""
        self.guard.load_state_dict(state["guard"])
        self.progress = Progress.from_dict(state["progress"])
        self.history = list(state["history"])
        self.epoch_position = state["epoch_position"]
        self.window = Window()


def round_text(row: dict[str, Any], num_rounds: int) -> str:
    """Return a round's row in words."""
    shards = [shard for shard in row["shards"] if shard["loss"] is not None]
    steps = sum(shard["steps"] for shard in shards) or 1

    def mean(name: str) -> float:
        return sum(shard[name] * shard["steps"] for shard in shards) / steps

    end = "proxies averaged" if row["kind"] == "average" else f"{sum(m['count'] for m in row['moves'])} samples moved"
    return (
        f"round {row['round']}/{num_rounds}: loss {mean('loss'):.4f}, skipped {mean('skipped_fraction'):.0%}, "
        f"augmented {mean('augmented_fraction'):.0%}, {end}"
    )
