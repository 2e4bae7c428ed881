"""What a person sees while a run goes on: the bar, a line per round, the trackers' curves, and the closing lines."""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL.Image import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sd_memguard.core.decision import Verdict
from sd_memguard.core.progress import Progress
from sd_memguard.core.rules import AUGMENT, Action, shares_text
from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.data.image_check import shortened
from sd_memguard.ensemble import round_text
from sd_memguard.training.failures import Seen
from sd_memguard.training.plan import Plan
from sd_memguard.training.run_state import RunState

logger = logging.getLogger(__name__)

SMOOTHING = 0.95


class RunLog:
    """Bar, log lines and trackers of one run; within its block, log lines do not break the bar.

    Args:
        accelerator: holds the trackers.
        plan: what the run will do.
        state: where the run stands when the block begins.
    """

    def __init__(self, accelerator: Accelerator, plan: Plan, state: RunState) -> None:
        self.accelerator, self.plan, self.state = accelerator, plan, state
        self._redirect = logging_redirect_tqdm()
        self._bar: tqdm | None = None
        self._loss = math.nan
        self._shares = dict.fromkeys((action.column for action in state.ensemble.guard.actions), 0.0)
        self._first_forward = 0
        self._started = time.monotonic()

    def __enter__(self) -> "RunLog":
        """Start the trackers and say what is about to happen."""
        plan, schedule = self.plan, self.plan.schedule
        settings = {k: v for k, v in plan.config.to_dict().items() if isinstance(v, bool | int | float | str)}
        self.accelerator.init_trackers(plan.config.tracker_project_name, settings, init_kwargs=self._tracker_options())
        self._redirect.__enter__()
        sizes = f"{len(plan.samples.sample_ids):,} samples in {schedule.num_shards} shard(s)"
        logger.info(
            "training: %s, %d steps of %d images in %s",
            *(sizes, schedule.total_steps, plan.effective_batch_size, rounds_text(schedule)),
        )
        if len(plan.targets.sizes) > 1:
            logger.info("images in %d sizes: %s", len(plan.targets.sizes), plan.targets)
        if plan.num_processes > 1:
            logger.info("%s", plan.division)
        if plan.config.random_affine:
            logger.info("images are shown %s", plan.affine_maps)
        if plan.config.varies_tags:
            logger.info("captions are seen with %s; their embeddings are not cached", plan.caption_forms)
        epochs = epochs_per_round(plan)
        if schedule.num_shards > 1 and epochs > MANY_EPOCHS:
            logger.warning(
                "each proxy takes %.1f epochs over its shard in a round: a small shard is memorized within its round; "
                "lower --steps_per_round or --num_shards",
                epochs,
            )
        is_guarded_alone = plan.config.memguard == "on" and not plan.config.early_stopping_gap
        if is_guarded_alone and schedule.num_shards == 1 and (seen := times_seen(plan)) > MANY_TIMES_SEEN:
            logger.warning(
                "each image is seen %.0f times: images that are seen so often are replicated although none is a "
                "duplicate; --load_best_model_at_end --early_stopping_gap 0.2 stops before",
                seen,
            )
        self._started = time.monotonic()
        return self

    def _tracker_options(self) -> dict[str, dict[str, Any]]:
        """Return what makes each tracker go on with the same run; what it was sent after the checkpoint comes again."""
        run_id, steps = self.state.run_id, self.state.ensemble.progress.global_step
        return {
            "tensorboard": {"purge_step": steps + 1} if steps else {},
            "wandb": {"id": run_id, "resume": "allow"},
            "trackio": {"name": run_id, "resume": "allow"},
            "comet_ml": {"experiment_key": run_id},
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the bar and the trackers, also when the run ends early.

        ``Accelerator.end_training`` would destroy the process group, too: under NCCL that waits for all processes, and
        those that have met no error never come to it.
        """
        if self._bar is not None:
            self._bar.close()
        self._redirect.__exit__(kind, error, traceback)
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def step(self, progress: Progress, verdicts: list[Verdict], learning_rate: float) -> None:
        """Show one step and send its numbers to the trackers."""
        if self._bar is None:
            steps, hidden = self.plan.schedule.total_steps, not self.accelerator.is_main_process
            self._bar = tqdm(total=steps, initial=progress.global_step - 1, unit="step", disable=hidden)
            self._first_forward = progress.image_forwards
        count = max(sum(len(verdict.losses) for verdict in verdicts), 1)
        loss = sum(float(verdict.losses.sum()) for verdict in verdicts) / count
        counts = [verdict.counts for verdict in verdicts]
        shares = {column: sum(one[column] for one in counts) / count for column in self._shares}
        # The mean begins again after a loss that is not finite.
        self._loss = SMOOTHING * self._loss + (1 - SMOOTHING) * loss if math.isfinite(self._loss) else loss
        self._shares = {
            column: SMOOTHING * self._shares[column] + (1 - SMOOTHING) * share for column, share in shares.items()
        }
        schedule = self.plan.schedule
        self._bar.set_description_str(
            f"round {progress.round_index + 1}/{schedule.num_rounds} "
            f"shard {progress.shard_index + 1}/{schedule.num_shards}",
            refresh=False,
        )
        shown = (f"{share:.0%} {column}" for column, share in self._shares.items())
        self._bar.set_postfix_str(", ".join((f"loss {self._loss:.4f}", *shown)), refresh=False)
        self._bar.update(progress.global_step - self._bar.n)
        fractions = {f"{column}_fraction": share for column, share in shares.items()}
        self.accelerator.log({"train_loss": loss, "lr": learning_rate, **fractions}, step=progress.global_step)

    def image_losses(self, seen: list[Seen], global_step: int) -> None:
        """Send the loss of each image of a step to the trackers, by the name of its file."""
        samples = self.plan.samples
        losses = {
            f"loss_for_{PurePath(samples.file(sample_id)).name}": loss
            for one in seen
            for sample_id, loss in zip(one.sample_ids.tolist(), one.verdict.losses.tolist(), strict=True)
        }
        self.accelerator.log(losses, step=global_step)

    def round(self, row: dict[str, Any]) -> None:
        """Write the line of a round and send its curves to the trackers."""
        logger.info("%s", round_text(row, self.plan.schedule.num_rounds))
        self.accelerator.log(_curves(row), step=row["global_step"])

    def generated(self, images: list[Image], global_step: int) -> None:
        """Send generated images of the validation prompts to the trackers that take images."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                stack = np.stack([np.asarray(image) for image in images])
                tracker.tracker.add_images("validation", stack, global_step, dataformats="NHWC")
            elif tracker.name in {"wandb", "comet_ml"}:
                tracker.log_images({"validation": images}, step=global_step)
            else:
                logger.warning("--report_to %s takes no images: the generated images are not sent", tracker.name)
        logger.info("generated %d validation images at step %d", len(images), global_step)

    def end(self, text: str) -> None:
        """Close the bar and write the closing lines."""
        if self._bar is not None:
            self._bar.close()
        logger.info("%s", text)

    def images_per_second(self, progress: Progress) -> float:
        """Return the images trained per second since this process began to train, everything included."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return (progress.image_forwards - self._first_forward) / seconds


def _curves(row: dict[str, Any]) -> dict[str, float]:
    """Return every number of a row of ``rounds.jsonl`` under the name of its curve."""
    counts = ("extra_steps", "empty_steps", "nonfinite_steps", "image_forwards")
    curves: dict[str, float] = {name: row[name] for name in counts}
    curves["moved_samples"] = sum(move["count"] for move in row["moves"])
    if "heldout_loss" in row:
        curves |= {"heldout_loss": row["heldout_loss"], "probe_train_loss": row["train_loss"]}
        curves["loss_gap"] = row["heldout_loss"] - row["train_loss"]
    if "relative_gap" in row:
        curves["relative_gap"] = row["relative_gap"]
    for shard in row["shards"]:
        values = {name: value for name, value in shard.items() if name != "shard" and value is not None}
        curves |= {f"shard_{shard['shard']}/{name}": value for name, value in values.items()}
    return curves


MANY_EPOCHS = 10
"""Epochs of a proxy over its shard within a round from which a warning is due."""
MANY_TIMES_SEEN = 50
"""The same for an image in the whole run: docs/results.md has replication after 40 and 80 times."""


def rounds_text(schedule: RoundSchedule) -> str:
    """Return the number of rounds and their length, which is that of the run where it has one round.

    >>> rounds_text(RoundSchedule.plan(40, 1, 50, redistributes=False))
    '1 round of 40 steps per proxy'
    """
    rounds = "1 round" if schedule.num_rounds == 1 else f"{schedule.num_rounds} rounds"
    return f"{rounds} of {min(schedule.steps_per_round, schedule.shard_steps(0))} steps per proxy"


def epochs_per_round(plan: Plan) -> float:
    """Return how many epochs a proxy takes over its shard in a round."""
    per_shard = plan.epoch_length / plan.schedule.num_shards
    return min(plan.schedule.steps_per_round, plan.schedule.shard_steps(0)) * plan.effective_batch_size / per_shard


def times_seen(plan: Plan) -> float:
    """Return how often the run sees each distinct image."""
    return plan.schedule.total_steps * plan.effective_batch_size / plan.epoch_length


def summary_text(summary: dict[str, Any], actions: Sequence[Action], output_dir: Path) -> str:
    """Return the closing lines of a run.

    Args:
        summary: see ``run_summary``.
        actions: of the sample rule.
        output_dir: the run folder.
    """
    ended = "stopped early" if summary["stopped_early"] else "done"
    steps = [f"{ended}: {summary['global_step']} steps", f"{summary['images_per_second']:.1f} images per second"]
    counts = [f"samples: {shares_text(actions, summary)}"] if actions else []
    counts += [f"steps without a clean sample {summary['empty_steps']}", f"samples moved {summary['moved_samples']}"]
    if AUGMENT in actions:
        steps.insert(1, f"{summary['extra_steps']} extra steps on augmented copies")
        counts.append(f"left in the augmentation queues {summary['augment_queue_left']}")
    lines = [", ".join(steps), "; ".join(counts)]
    if summary["unreadable_samples"]:
        why = "whose image could no longer be read, or whose crop missed its mask"
        lines.append(f"samples {why}: {summary['unreadable_samples']}")
    if None not in (summary["train_loss"], summary["heldout_loss"]):
        gap = "" if summary["relative_gap"] is None else f", relative gap {summary['relative_gap']:.0%}"
        losses = f"images trained on {summary['train_loss']:.4f}, held out {summary['heldout_loss']:.4f}"
        lines.append(f"denoising loss: {losses}{gap}")
    if summary["kept_step"] not in (None, summary["global_step"]):
        lines.append(f"kept: the model of step {summary['kept_step']}, by its held-out loss")
    if summary["memory_prone"]:
        columns = " or ".join(action.column for action in actions if action.memory_prone)
        lines.append(f"most memory-prone samples (share {columns} of the times seen):")
        lines += [
            f"  {row['skip_ratio']:4.0%} of {row['seen']:4d}  {shortened(row['file'])}  {shortened(row['caption'])}"
            for row in summary["memory_prone"]
        ]
    return "\n".join([*lines, f"the fine-tuned pipeline is in {output_dir}", *summary["exports"]])
