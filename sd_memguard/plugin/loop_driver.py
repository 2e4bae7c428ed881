"""Pushes the ensemble through a loop that somebody else has written.

The loop asks for batches and steps its optimizer; all else follows from these two events. Between the last step of a
turn and the next batch the proxies change places, so that what a loop does after a step (EMA, logs, checkpoints) still
finds the proxy that took it.
"""

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sd_memguard.core.decision import Verdict
from sd_memguard.core.sampler import SampleRef
from sd_memguard.ensemble import Ensemble, round_text
from sd_memguard.errors import LoopError
from sd_memguard.plugin.backends import LoopBackend
from sd_memguard.plugin.gate import ClosedWindow, RowBatch, RowGate, before_update, only_grad_scaler
from sd_memguard.plugin.lr_table import LRTable, learning_rates, set_learning_rates
from sd_memguard.plugin.step_hooks import call_hooks_of
from sd_memguard.proxies.scalers import ProxyScalers

logger = logging.getLogger(__name__)

AUGMENTED = "augmented"
"""What the gate hands back with a batch of augmented copies."""
TOO_MANY_SKIPPED, FIRST_SAMPLES = 0.7, 500
"""Share of a run's first samples skipped at which the loss falls faster than the memory bank follows."""


@dataclass
class Window:
    """The batches since the last optimizer step."""

    batches: int = 0
    weighed: int = 0
    samples: int = 0
    clean: int = 0
    factor: float = 1.0
    sample_ids: list[int] = field(default_factory=list)
    augmented: bool = False


class LoopDriver:
    """Drives an ensemble by the events of a foreign loop.

    The losses come from ``weigh`` where the loop calls it, else from the row gate on its denoiser.

    Args:
        ensemble: what is driven.
        optimizer: the plain torch optimizer of the loop; its steps are watched by hooks.
        backend: the loop.
        lr_table: learning rates of the plain run by its step, where the proxies have to follow them.
        has_loader: whether the loop's batches come from the guard, with their sample ids.

    Attributes:
        gate: on the loop's denoiser, None where there can be none or the loop weighs its losses.
        samples_judged: in this process; ``samples_skipped`` of them were skipped, and ``samples_to_augment`` wait or
            have waited for an augmented copy.
        losses_seen: batches whose losses were seen; ``copies_seen`` of them were augmented copies, and not judged.
        refs: the samples of the batch under way; none for copies, nor where the loop keeps its order.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        optimizer: Optimizer,
        backend: LoopBackend,
        lr_table: LRTable | None = None,
        *,
        has_loader: bool = True,
    ) -> None:
        self.ensemble, self.guard, self.schedule = ensemble, ensemble.guard, ensemble.schedule
        self.optimizer, self.backend, self.lr_table, self.has_loader = optimizer, backend, lr_table, has_loader
        self.gate: RowGate | None = None
        self.why_no_gate = ""
        self.window = Window()
        self.refs: list[SampleRef] = []
        self.restore: Callable[[], None] | None = None
        self.batches_seen = self.losses_seen = self.copies_seen = self.num_restores = self.epoch_position = 0
        self.stepped = True
        self._unrecorded: list[Verdict] = []
        self.samples_judged = self.samples_skipped = self.samples_to_augment = 0
        self._skips_checked = False
        self._loop_rates: list[float] = []
        self._just_restored = False
        self._scalers: ProxyScalers | None = None
        call_hooks_of(optimizer)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(lambda *_: self._after_step())
        ensemble.listeners.append(self._log_round)

    def _log_round(self, row: dict[str, Any]) -> None:
        endless = self.schedule.total_steps == sys.maxsize
        logger.info("%s", round_text(row, row["round"] if endless else self.schedule.num_rounds))

    # The loop asks for a batch.

    @property
    def turn(self) -> tuple[int, int, int]:
        """Return what changes when the order of the samples that lie ahead does."""
        return (self.guard.shard_index, self.ensemble.progress.round_index, self.num_restores)

    def advance_turn(self) -> None:
        """Do what is due between two steps: take up a checkpoint, hand over to the next proxy, end the round."""
        if self.restore is not None:
            restore, self.restore = self.restore, None
            restore()
            self.num_restores += 1
        if self.window.batches and self.backend.overflowed():
            self.ensemble.progress.nonfinite_steps += 1
            self._count_step()
        if self.window.batches:
            return
        progress = self.ensemble.progress
        before = self.guard.shard_index
        while not self.ensemble.is_finished and self.ensemble.begin_turn(progress.shard_index) == 0:
            if progress.shard_index + 1 < self.schedule.num_shards:
                progress.shard_index += 1
            else:
                self.ensemble.end_round()
        if self.guard.shard_index != before:
            self._proxy_scalers(before).activate(self.guard.shard_index)

    def _proxy_scalers(self, active: int) -> ProxyScalers:
        """Return the scales of the proxies; one that the guard was not told of is there once a turn is over."""
        if self._scalers is None:
            scaler = self.backend.grad_scaler() or only_grad_scaler()
            self._scalers = ProxyScalers(scaler, self.schedule.num_shards, active)
        return self._scalers

    def take(self, refs: list[SampleRef]) -> None:
        """Count a batch that goes out to the loop."""
        self.ensemble.advance(len(refs))
        self.open_batch([ref.sample_id for ref in refs])
        self.refs = refs

    def open_batch(self, sample_ids: list[int], *, augmented: bool = False) -> None:
        """Begin a batch of these samples; the losses that come next are theirs."""
        self.window.batches += 1
        self.window.sample_ids, self.window.augmented = sample_ids, augmented
        self.refs = []
        self.batches_seen += 1
        if self.gate is not None:
            self.gate.begin_batch(sample_ids if self.guard.has_ids else None, AUGMENTED if augmented else None)
        if augmented:
            self.ensemble.count_augmented()

    def on_epoch_end(self) -> None:
        """Hear that the loop has had all batches of an epoch.

        Raises:
            LoopError: it has shown none of their losses.
        """
        if self.gate is None and self.batches_seen and not self.losses_seen:
            raise LoopError(
                "an epoch is over and the guard has seen no losses, so that nothing was guarded; call "
                "`guard.weigh(losses, timesteps, batch['sample_id'])` on every batch and backward `verdict.loss`"
            )

    def on_loop_end(self) -> None:
        """Hear that the loop asks for no more batches for now: after its last step it may export the model."""
        self.epoch_position = 0
        if self.ensemble.progress.global_step >= self.schedule.total_steps:
            self.advance_turn()

    # The loop weighs the losses, or the gate sees them.

    def weigh(
        self, losses: Tensor, timesteps: Tensor, sample_ids: Tensor | None = None, weights: Tensor | None = None
    ) -> Verdict:
        """Return the verdict on the batch under way, its loss such that a step's gradient is the mean of its window.

        The first call takes the gate out of the loop. See ``SampleGuard.judge`` for the arguments; without sample ids
        the losses are those of the batch under way, in its order.

        Raises:
            LoopError: the samples are not those that the loader has given out, or the gate has judged batches before.
        """
        self._take_gate_out()
        if self.guard.has_ids and sample_ids is None and len(losses) == len(self.window.sample_ids):
            sample_ids = torch.tensor(self.window.sample_ids)
        if sample_ids is not None and self.has_loader:
            self._check_batch(sample_ids)
        if not self.has_loader:
            self.window.batches += 1
        if self.window.augmented:  # copies say nothing of how well a sample itself is known
            self.copies_seen += 1
            verdict = self.guard.pass_through(losses, weights)
        else:
            verdict = self.guard.judge(losses, timesteps, sample_ids, weights)
            self._unrecorded.append(verdict)
        self.window.weighed = self.window.batches
        self.losses_seen += 1
        self.ensemble.progress.image_forwards += len(losses)
        return replace(verdict, loss=verdict.loss_sum / self._divisor(len(losses), verdict.num_clean))

    def _take_gate_out(self) -> None:
        if self.gate is None:
            return
        if self.losses_seen:
            raise LoopError(
                f"`weigh` was called after {self.losses_seen} batch(es) that the guard has judged by the gradient at "
                "the denoiser's output, since the loop had not weighed them; weigh every batch, or none"
            )
        self.gate.remove()
        self.gate = None

    def judge(self, losses: Tensor, bins: Tensor, batch: RowBatch) -> Tensor:
        """Return the weights of a batch that the gate asks for; the host waits for nothing."""
        self.losses_seen += 1
        self.ensemble.progress.image_forwards += len(losses)
        if batch.tag == AUGMENTED:
            self.copies_seen += 1
            return torch.ones_like(losses)
        verdict = self.guard.judge(losses, bins, batch.sample_ids, wait=False)
        self._unrecorded.append(verdict)
        return verdict.weights

    def _check_batch(self, sample_ids: Tensor) -> None:
        strangers = sorted(set(sample_ids.tolist()) - set(self.window.sample_ids))
        if self.window.batches == 0 or strangers:
            raise LoopError(
                f"`sample_ids` {strangers or sample_ids.tolist()} are not of the batch under way; iterate over the "
                'dataloader that the guard has returned, and give `weigh` its `batch["sample_id"]`'
            )

    def _divisor(self, num_samples: int, num_clean: int) -> float:
        """Return what the sum over the clean samples of a batch is divided by.

        The gradient of a step is the mean over the clean samples of all batches of its window, however many they are:
        the gradients so far are rescaled whenever a batch changes the share of clean samples. Where other losses
        share the step (class images), each batch is a mean of its own.
        """
        window = self.window
        window.samples += num_samples
        window.clean += num_clean
        if window.batches == 1:
            window.factor = num_samples / max(num_clean, 1)
            return float(max(num_clean, 1))
        before, window.factor = window.factor, window.samples / max(window.clean, 1)
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if before != window.factor and gradients:
            torch._foreach_mul_(gradients, window.factor / before)
        return num_samples / window.factor

    # The loop steps its optimizer.

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return before_update(self._check_weighed, args, kwargs)

    def _check_weighed(self) -> None:
        """Hear of a step of a loop that weighs its losses; the gate tells of those of others."""
        if self.gate is not None:
            return
        window = self.window
        self._check_batches(window.batches)
        if window.weighed < window.batches:
            raise LoopError(
                f"the optimizer was about to step, but the guard has not seen the losses of {window.batches} "
                "batch(es): call `guard.weigh(losses, timesteps, batch['sample_id'])` on every batch and backward "
                f"`verdict.loss`{self.why_no_gate}"
            )
        is_empty = window.clean == 0
        if is_empty:  # a zero gradient would still move the weights, by decay and by momentum
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        self._begin_step(is_empty=is_empty)

    def on_window(self, closed: ClosedWindow) -> None:
        """Hear from the gate of a step that is about to be taken, or not if nothing of its window was kept."""
        self._check_batches(self.window.batches if self.has_loader else closed.num_calls)
        self._begin_step(is_empty=closed.is_empty)

    def _check_batches(self, count: int) -> None:
        if count == 0:
            raise LoopError(
                "the optimizer was about to step on a batch that did not come from the guard; iterate over the "
                "dataloader that `prepare` or `attach` returned"
            )

    def _begin_step(self, *, is_empty: bool) -> None:
        progress = self.ensemble.progress
        several = self.schedule.num_shards > 1
        if several and (self.ensemble.is_finished or progress.global_step >= self.schedule.total_steps):
            raise LoopError(
                f"the loop goes on after the {self.schedule.total_steps} steps that `total_steps` announced, when the "
                "proxies have been averaged for good; announce as many steps as the loop takes"
            )
        self.record()
        self.stepped = not is_empty
        progress.empty_steps += is_empty
        if self.lr_table is not None:
            self._loop_rates = learning_rates(self.optimizer)
            if not self._just_restored:  # the rates are those of the run as it was planned then
                self._check_rates(self.lr_table)
            self._just_restored = False
            plain_step = self.schedule.num_shards * progress.shard_steps[self.guard.shard_index]
            set_learning_rates(self.optimizer, self.lr_table[min(plain_step, len(self.lr_table) - 1)])

    def record(self) -> None:
        """Enter what was decided since the last call in the meters, waiting for the device."""
        self.guard.count()
        verdicts, self._unrecorded = self._unrecorded, []
        for verdict in verdicts:
            self.ensemble.record(verdict)
            self.samples_judged += len(verdict.losses)
            self.samples_skipped += verdict.num_skipped
            self.samples_to_augment += verdict.num_augmented
        if not self._skips_checked and self.samples_judged >= FIRST_SAMPLES:
            self._skips_checked = True
            share = self.samples_skipped / self.samples_judged
            if share > TOO_MANY_SKIPPED:
                logger.warning(
                    "%.0f%% of the first %d samples were skipped: the loss falls faster than the memory bank follows, "
                    "as in training from scratch; lower `skip_threshold` or `bank_decay`, or guard the run once the "
                    "loss is stable",
                    *(100 * share, self.samples_judged),
                )

    def _check_rates(self, lr_table: LRTable) -> None:
        """Refuse a schedule that is not where one step for each step of the optimizer has brought it."""
        progress = self.ensemble.progress
        step = progress.global_step - progress.nonfinite_steps  # accelerate does not count those
        expected = lr_table[min(step, len(lr_table) - 1)]
        if any(not math.isclose(a, b, rel_tol=1e-5) for a, b in zip(self._loop_rates, expected, strict=True)):
            raise LoopError(
                f"at step {step} the learning rate is {self._loop_rates}, where `lr_scheduler` is at {expected} if it "
                "is stepped once after each optimizer step; do so, or omit it of `prepare` or `attach`, and the "
                "learning rate is the loop's affair"
            )

    def _after_step(self) -> None:
        if self.lr_table is not None:  # the schedule of the loop goes on from its own value
            set_learning_rates(self.optimizer, self._loop_rates)
        self._count_step()

    def _count_step(self) -> None:
        self.ensemble.count_step()
        self.window = Window()
        if not self.has_loader:
            self.advance_turn()

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return where the loop stands, but for the proxies."""
        if self.window.batches:
            logger.warning(
                "a checkpoint in the middle of a step: the gradients of %d batch(es) are not part of it",
                self.window.batches,
            )
        self.record()
        scalers = [] if self.schedule.num_shards == 1 else self._proxy_scalers(self.guard.shard_index).state()
        return {"ensemble": self.ensemble.state_dict(), "epoch_position": self.epoch_position, "scalers": scalers}

    def set_steps_per_round(self, steps: int) -> None:
        """Keep the rounds that a run was begun with, whatever ``auto`` is for its new length."""
        self.schedule = self.ensemble.schedule = replace(self.schedule, steps_per_round=steps)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state, but for the proxies."""
        self.ensemble.load_state_dict(state["ensemble"])
        self.epoch_position = state["epoch_position"]
        if state["scalers"]:
            active = self.ensemble.progress.shard_index
            self._proxy_scalers(active).load(state["scalers"], active)
        self._just_restored = True
        self.window = Window()
