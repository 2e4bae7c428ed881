"""The training loop: rounds, shards, steps."""

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor

from sd_memguard.config import TrainConfig
from sd_memguard.core.progress import Progress
from sd_memguard.core.seeding import Address
from sd_memguard.core.visits import Visit
from sd_memguard.guard import AugmentBatch, MemorizationGuard, Verdict
from sd_memguard.proxies.lora import LoraProxies
from sd_memguard.proxies.state_file import load_state, save_state
from sd_memguard.training.batches import Batch, BatchSource, Encoders, visit_address
from sd_memguard.training.checkpoint import (
    find_checkpoint,
    finished_summary,
    prune_checkpoints,
    refuse_changes,
    remove_leftovers,
    save_checkpoint,
)
from sd_memguard.training.dry_run import describe_plan
from sd_memguard.training.export import UNET, write_pipeline
from sd_memguard.training.exporter import export_at_end
from sd_memguard.training.faults import NonFiniteError, Seen, check_finite, explained_faults, suspects
from sd_memguard.training.hub import push_to_hub
from sd_memguard.training.interrupt import Interrupted, StopRequest
from sd_memguard.training.learning_rate import learning_rate_schedule
from sd_memguard.training.lock import run_lock
from sd_memguard.training.logs import RunLog, summary_text
from sd_memguard.training.lora import merge
from sd_memguard.training.loss import DenoisingLoss, Noising
from sd_memguard.training.models import load_unet
from sd_memguard.training.records import (
    PROXIES_FOLDER,
    RunRecords,
    memory_prone_samples,
    round_row,
)
from sd_memguard.training.run_folder import FOLDER
from sd_memguard.training.setup import (
    Plan,
    base_learning_rate,
    make_accelerator,
    make_ema,
    make_plan,
    make_proxies,
    prepare_models,
)
from sd_memguard.training.trained_run import TrainedRun
from sd_memguard.training.validation import LossProbe, MeanLoss, draw_prompts

logger = logging.getLogger(__name__)

MAX_NONFINITE_STEPS = 5
"""Steps in a row that may be left out for a loss or gradient that is not finite."""


class TrainResult(NamedTuple):
    """What a run has made: its folder, the steps over all proxies, and the closing summary."""

    output_dir: Path
    global_step: int
    summary: dict[str, Any]


def train(config: TrainConfig) -> TrainResult:
    """Fine-tune as configured and write the run folder.

    Raises:
        UserError: a setting, file or folder that cannot be used; found before a model is loaded.
        NonFiniteError: the losses or gradients of several steps in a row are not finite.
        Interrupted: a signal asked the run to stop; it has saved a checkpoint.
    """
    plan = make_plan(config)
    accelerator = make_accelerator(plan.config)
    if plan.config.dry_run:
        print(describe_plan(plan, accelerator))
        return TrainResult(plan.output_dir, 0, {})
    with run_lock(plan.output_dir), explained_faults(plan.config):
        if (summary := finished_summary(plan)) is not None:
            logger.info(
                "%s holds this run finished after %d steps: nothing is left to do; a larger --max_train_steps goes on",
                *(plan.output_dir, summary["global_step"]),
            )
            return TrainResult(plan.output_dir, summary["global_step"], summary)
        remove_leftovers(plan.output_dir)
        trainer = Trainer(plan, accelerator)
        trainer.resume()
        with StopRequest() as stop, trainer.log:
            trainer.fit(stop)
            return trainer.finish()


class Trainer:
    """One run: the models, the guard, the proxies, and where they stand.

    Args:
        plan: what is to be done.
        accelerator: device, precision and trackers.
    """

    def __init__(self, plan: Plan, accelerator: Accelerator) -> None:
        config = plan.config
        self.plan, self.config, self.schedule, self.accelerator = plan, config, plan.schedule, accelerator
        models = prepare_models(plan, accelerator)
        self.unet: UNet2DConditionModel = models.unet
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        self.ema = make_ema(self.unet, config, accelerator.device)
        self.proxies = make_proxies(plan, self.unet, self.ema, dtype, accelerator.device)
        self.parameters = list(self.proxies.parameters.values())

        # Pictures and captions.
        encoders = Encoders(models, accelerator.device, dtype)
        self.source = BatchSource(plan.samples, encoders, config, plan.seed, progress=True)
        num_timesteps = models.noise_scheduler.config.num_train_timesteps
        self.noising = Noising(plan.seed, num_timesteps, config.noise_offset, config.input_perturbation)
        dream = config.dream_detail_preservation if config.dream_training else None
        self.loss = DenoisingLoss(models.noise_scheduler, config.snr_gamma, dream)
        self.probes = self._make_probes(encoders, num_timesteps)

        # The guard and the step.
        unusable = torch.ones(plan.samples.num_rows, dtype=torch.bool)
        unusable[plan.samples.sample_ids] = False
        self.guard = MemorizationGuard(
            config.guard,
            plan.samples.num_rows,
            num_timesteps=num_timesteps,
            groups=None if plan.samples.groups is None else torch.from_numpy(plan.samples.groups),
            exclude=torch.nonzero(unusable).flatten(),
            device=accelerator.device,
        )
        self.model, self.optimizer = accelerator.prepare(self.unet, self.proxies.optimizer)
        self.learning_rate = learning_rate_schedule(
            config.lr_scheduler,
            base_learning_rate(config),
            config.lr_warmup_steps,
            self.schedule.total_steps,
            self.schedule.num_shards,
        )
        if self.source.caches_everything and not self._augments:
            encoders.release()

        self.progress = Progress(self.schedule.num_shards)
        self.nonfinite_in_a_row = 0
        self.records = RunRecords(plan.output_dir)
        self.log = RunLog(accelerator, plan)

    @property
    def _prompts(self) -> list[str]:
        """The captions to draw: ``--validation_prompts`` once each, ``--validation_prompt`` several times."""
        config = self.config
        repeated = [config.validation_prompt] * (config.num_validation_images or 0) if config.validation_prompt else []
        return [*(config.validation_prompts or ()), *repeated]

    @property
    def _augments(self) -> bool:
        guard = self.config.guard
        return 0 < guard.skip_threshold < guard.augment_threshold

    def _make_probes(self, encoders: Encoders, num_timesteps: int) -> dict[str, LossProbe]:
        """Return the probes of the loss on training and on held-out pictures, where there are such."""
        if self.plan.heldout is None:
            return {}
        heldout = BatchSource(self.plan.heldout, encoders, self.config, self.plan.seed, cache=False)
        return {
            name: LossProbe(source, self.plan.seed, num_timesteps, self.config.train_batch_size)
            for name, source in (("train_loss", self.source), ("heldout_loss", heldout))
        }

    # The run.

    def fit(self, stop: StopRequest) -> None:
        """Train to the end: every round, in it every shard, in it every step."""
        progress = self.progress
        self.records.begin(self.config, self.plan.resolved)
        while progress.round_index < self.schedule.num_rounds:
            while progress.shard_index < self.schedule.num_shards:
                self.train_shard(progress.shard_index, stop)
                progress.shard_index += 1
            self.end_round()

    def train_shard(self, shard_index: int, stop: StopRequest) -> None:
        """Train one proxy on its shard for what is left of its steps in this round."""
        progress, cursor = self.progress, self.progress.cursors[shard_index]
        # Reckoned, not remembered: a run that goes on for longer may find its last round unfinished.
        progress.step_in_round = (
            progress.shard_steps[shard_index] - progress.round_index * self.schedule.steps_per_round
        )
        num_steps = self.schedule.steps_in_round(progress.round_index, shard_index) - progress.step_in_round
        if num_steps == 0:
            return
        self.proxies.activate(shard_index)
        self.guard.shard_index = shard_index
        members = self.guard.plan.members(shard_index)
        groups = None if self.guard.balanced_groups is None else self.guard.balanced_groups[members]
        pass_length = self.guard.num_pictures()[shard_index]
        size, accumulation = self.config.train_batch_size, self.config.gradient_accumulation_steps
        visits = cursor.peek(members, num_steps * self.plan.visits_per_step, self.plan.seed, groups)
        chunks = [visits[start : start + size] for start in range(0, len(visits), size)]
        batches = self.source.batches(chunks)
        for _ in range(num_steps):
            verdicts = self.step(batches, accumulation)
            while (waiting := self.guard.take_augment_batch(size)) is not None:
                self.augmented_step(waiting)
            cursor.advance(self.plan.visits_per_step, pass_length)
            progress.shard_steps[shard_index] += 1
            progress.step_in_round += 1
            progress.global_step += 1
            progress.meters[shard_index].steps += 1
            self.log.step(progress, verdicts, self.optimizer.param_groups[0]["lr"])
            self._checkpoint_if_due(stop)

    def step(self, batches: Iterator[tuple[list[Visit], Batch]], accumulation: int) -> list[Verdict]:
        """Take one optimizer step over as many batches, and return the guard's verdicts.

        The gradient is the mean over the clean samples of all the batches: each batch is divided by its size, and the
        sum scaled at the end, when the number of clean samples is known.
        """
        self._set_learning_rate()
        seen: list[Seen] = []
        for _ in range(accumulation):
            visits, batch = next(batches)
            self.progress.lost_visits += self.config.train_batch_size - len(visits)
            if not visits:
                continue
            losses, timesteps = self._losses(batch, [visit_address(visit) for visit in visits])
            sample_ids = torch.tensor([visit.sample_id for visit in visits])
            verdict = self.guard.weigh(losses, timesteps, sample_ids, self.loss.weights(timesteps))
            self.accelerator.backward(verdict.clean_sum / self.plan.visits_per_step)
            self.progress.meters[self.guard.shard_index].record(verdict)
            seen.append(Seen(sample_ids, timesteps, verdict))
        verdicts = [one.verdict for one in seen]
        if not all(bool(torch.isfinite(verdict.losses).all()) for verdict in verdicts):
            self._leave_out("loss", seen)
            return verdicts
        num_clean = sum(verdict.num_clean for verdict in verdicts)
        if num_clean == 0:
            self.optimizer.zero_grad()
            self.progress.empty_steps += 1
            return verdicts
        self._update(scale=self.plan.visits_per_step / num_clean, seen=seen)
        return verdicts

    def augmented_step(self, waiting: AugmentBatch) -> None:
        """Take an extra optimizer step on augmented copies: no AGC, no DREAM, bank and schedule untouched."""
        shard_index = self.guard.shard_index
        number = self.progress.extra_steps[shard_index]
        addresses: list[Address] = [(shard_index, number, slot) for slot in range(len(waiting.sample_ids))]
        addresses, batch = self.source.augmented(waiting.sample_ids, addresses, waiting.magnitude)
        if not addresses:
            return
        losses, timesteps = self._losses(batch, addresses, purpose="augment_", dream=False)
        weights = self.loss.weights(timesteps)
        self.accelerator.backward((losses if weights is None else losses * weights).mean())
        self._update(scale=1.0, seen=[])
        self.progress.extra_steps[shard_index] += 1
        self.progress.round_extra_steps += 1

    def _losses(
        self, batch: Batch, addresses: list[Address], purpose: str = "", *, dream: bool = True
    ) -> tuple[Tensor, Tensor]:
        latents, embeddings = batch
        timesteps, noise, input_noise = self.noising.draw(addresses, latents.shape[1:], latents.device, purpose)
        losses = self.loss(self.model, latents, embeddings, timesteps, noise, input_noise, dream=dream)
        forwards = 2 if dream and self.config.dream_training else 1
        self.progress.picture_forwards += forwards * len(addresses)
        return losses, timesteps

    def _update(self, scale: float, seen: list[Seen]) -> None:
        """Clip the gradients and step, unless they are not finite (a GradScaler takes care of that by itself)."""
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], scale)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):
            self._leave_out("gradient", seen)
            return
        self.nonfinite_in_a_row = 0
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self._step_ema()

    def _step_ema(self) -> None:
        assert self.ema is not None
        if self.config.offload_ema:
            self.ema.to(self.accelerator.device, non_blocking=True)
        self.ema.step(self.unet.parameters())
        if self.config.offload_ema:
            self.ema.to("cpu", non_blocking=True)

    def _leave_out(self, what: str, seen: list[Seen]) -> None:
        """Leave the step out, name its samples, and stop the run when that happens again and again."""
        self.optimizer.zero_grad()
        self.progress.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        step = self.progress.global_step + 1
        logger.warning("step %d is left out: its %s is not finite (%s)", step, what, suspects(seen, self.plan.samples))
        if self.nonfinite_in_a_row >= MAX_NONFINITE_STEPS:
            raise NonFiniteError(
                f"the {what} of {MAX_NONFINITE_STEPS} steps in a row was not finite, the last at step {step}; the "
                "weights are those before. Lower `--learning_rate`, use `--mixed_precision bf16` or `no`, or look "
                "at the pictures; the last checkpoint is untouched"
            )

    def _set_learning_rate(self) -> None:
        rate = self.learning_rate(self.progress.shard_steps[self.guard.shard_index])
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    # The end of a round.

    def end_round(self) -> None:
        """Average the proxies or move samples between shards, look at the aggregate, and write the round down."""
        progress, weights = self.progress, self.guard.aggregation_weights()
        kind = self.schedule.kind(progress.round_index)
        moves, sizes = None, self.guard.plan.sizes()
        if kind == "average":
            distances = self.proxies.average(weights)
        else:
            distances = self.proxies.distances(weights)
            moves = self.guard.redistribute()
            for cursor in progress.cursors:
                cursor.begin_pass()
        row = round_row(kind, progress, self.records.rounds, self.guard.banks, sizes, distances, moves, self._look())
        self.records.add_round(row)
        self.records.write_samples(self.plan.samples, self.guard)
        self.records.write_banks(self.guard.banks)
        self.log.round(row, progress.global_step)
        progress.begin_round()

    def _look(self) -> dict[str, MeanLoss]:
        """Return the probes' losses of the aggregate, and draw with it when that is due."""
        draws = self._drawing_is_due()
        if not self.probes and not draws:
            return {}
        with self.proxies.averaged(self.guard.aggregation_weights()):
            if draws:
                self._draw()
            return {name: probe.measure(self.unet, self.loss) for name, probe in self.probes.items()}

    def _drawing_is_due(self) -> bool:
        """Say whether a multiple of ``--validation_epochs`` passes was completed, or the first or last round ends."""
        if not self._prompts:
            return False
        per_epoch = self.plan.pass_length
        done = self.progress.global_step * self.plan.visits_per_step // per_epoch
        steps_before = self.records.rounds[-1]["global_step"] if self.records.rounds else 0
        before, every = steps_before * self.plan.visits_per_step // per_epoch, self.config.validation_epochs
        return done // every > before // every or self.progress.round_index in {0, self.schedule.num_rounds - 1}

    def _draw(self) -> None:
        folder, variant = self.plan.pipeline, self.config.variant
        images = draw_prompts(folder, self.unet, self._prompts, self.accelerator, self.plan.seed, variant)
        self.log.drawings(images, self.progress.global_step)

    @contextmanager
    def _aggregate(self) -> Iterator[UNet2DConditionModel]:
        """Give the aggregate as a plain UNet in float32, for as long as the block lasts."""
        weights = self.guard.aggregation_weights()
        if isinstance(self.proxies, LoraProxies):
            yield merge(load_unet(self.plan.pipeline, self.config), self.proxies.merged(weights))
            return
        with self.proxies.averaged(weights):
            yield self.unet

    # Checkpoints.

    def _checkpoint_if_due(self, stop: StopRequest) -> None:
        due = self.progress.global_step % self.config.checkpointing_steps == 0
        if due or stop.received is not None:
            self.save_checkpoint()
        if stop.received is not None:
            logger.warning(
                "%s: saved step %d; go on with the same command and --resume_from_checkpoint latest",
                stop.received.name,
                self.progress.global_step,
            )
            raise Interrupted(128 + stop.received)

    def save_checkpoint(self) -> Path:
        """Write a checkpoint, then remove those beyond the limit."""
        folder = save_checkpoint(self.plan.output_dir, self.progress.global_step, self._write_checkpoint)
        prune_checkpoints(self.plan.output_dir, self.config.checkpoints_total_limit)
        return folder

    def _write_checkpoint(self, folder: Path) -> None:
        with self._aggregate() as unet:
            check_finite(unet)
            unet.save_pretrained(folder / UNET, max_shard_size="100GB")
        private = folder / FOLDER
        (private / PROXIES_FOLDER).mkdir(parents=True)
        scaler = self.accelerator.scaler
        state = {
            "config": self.config.to_dict(),
            "progress": self.progress.to_dict(),
            "guard": self.guard.state_dict(),
            "proxies": self.proxies.save(private / PROXIES_FOLDER),
            "rounds": self.records.rounds,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        save_state(state, private, "state")

    def resume(self) -> None:
        """Go on from the checkpoint that was asked for; without one, begin.

        Raises:
            CheckpointError: it is missing or damaged, or settings that shape the run have changed.
        """
        wanted = self.config.resume_from_checkpoint
        folder = find_checkpoint(self.plan.output_dir, wanted) if wanted else None
        if folder is None:
            if wanted:
                logger.warning("no checkpoint in %s yet: starting a new run", self.plan.output_dir)
            return
        state = load_state(folder / FOLDER, "state")
        refuse_changes(state["config"], self.config.to_dict(), folder)
        self.guard.load_state_dict(state["guard"])
        self.proxies.load(folder / FOLDER / PROXIES_FOLDER, state["proxies"])
        self.progress = Progress.from_dict(state["progress"])
        self.progress.shard_index = 0  # shards that have taken the steps of this round are passed over
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.records.restore_rounds(state["rounds"])
        logger.info("going on from %s", folder)
        before, now = state["config"]["max_train_steps"], self.config.max_train_steps
        if before != now and not self.config.lr_scheduler.startswith("constant"):
            logger.warning(
                "--max_train_steps is %d instead of %d: from here on the learning rate follows the longer curve",
                *(now, before),
            )

    # The end of the run.

    def finish(self) -> TrainResult:
        """Write the pipeline, draw, upload, and say how it went."""
        config, output_dir, progress = self.config, self.plan.output_dir, self.progress
        with self._aggregate() as unet:
            check_finite(unet)
            write_pipeline(self.plan.pipeline, unet, output_dir, config.variant)
        self.records.write_samples(self.plan.samples, self.guard)
        exports = export_at_end(TrainedRun(output_dir, config, self.schedule.num_shards))
        summary = {**self.summary(), **exports.summary()}
        self.records.write_summary(summary)
        shutil.rmtree(self.records.folder / PROXIES_FOLDER, ignore_errors=True)  # the resting ones, if on disk
        self.log.end(summary_text(summary, output_dir))
        if config.push_to_hub:
            push_to_hub(output_dir, config, summary)
        exports.raise_failures()
        return TrainResult(output_dir, progress.global_step, summary)

    def summary(self) -> dict[str, Any]:
        """Return what the closing lines, the model card and callers report."""
        progress, ledger = self.progress, self.guard.ledger
        visits = max(int(ledger.seen.sum()), 1)
        last = self.records.rounds[-1] if self.records.rounds else {}
        return {
            "global_step": progress.global_step,
            "num_shards": self.schedule.num_shards,
            "num_rounds": self.schedule.num_rounds,
            "extra_steps": sum(progress.extra_steps),
            "empty_steps": progress.empty_steps,
            "nonfinite_steps": progress.nonfinite_steps,
            "lost_visits": progress.lost_visits,
            "picture_forwards": progress.picture_forwards,
            "pictures_per_second": self.log.pictures_per_second(progress),
            "skipped_fraction": int(ledger.skipped.sum()) / visits,
            "augmented_fraction": int(ledger.augmented.sum()) / visits,
            "moved_samples": int(ledger.moves.sum()),
            "augment_queue_left": sum(len(queue) for queue in self.guard.queues),
            "train_loss": last.get("train_loss"),
            "heldout_loss": last.get("heldout_loss"),
            "memory_prone": memory_prone_samples(self.plan.samples, self.guard),
        }
