"""The training loop: rounds, shards, steps."""

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor

from sd_memguard.config import TrainConfig
from sd_memguard.core.async_copy import AsyncCPUCopy
from sd_memguard.core.decision import Verdict
from sd_memguard.core.progress import Progress
from sd_memguard.core.sampler import SampleRef, split_by_bucket
from sd_memguard.core.seeding import Address
from sd_memguard.data.batches import AugmentedCopy, Batch, BatchSource, Encoders, sample_address
from sd_memguard.distributed import ProcessGroup
from sd_memguard.ensemble import Ensemble
from sd_memguard.environment import launched_processes
from sd_memguard.errors import UserError
from sd_memguard.export.exporter import export_at_end
from sd_memguard.export.hub import push_to_hub
from sd_memguard.export.pipeline_folder import write_pipeline
from sd_memguard.models.pipeline import recognize, replaced_parts
from sd_memguard.proxies.scalers import ProxyScalers
from sd_memguard.runs.checkpoint import remove_leftovers
from sd_memguard.runs.folder import PROXIES_FOLDER
from sd_memguard.runs.lock import run_lock
from sd_memguard.runs.records import RunRecords, run_summary
from sd_memguard.runs.trained_run import TrainedRun
from sd_memguard.sample_guard import AugmentBatch, SampleGuard
from sd_memguard.training.best import BestModel, best_round, is_gap_reached, is_patience_over, relative_gap
from sd_memguard.training.build import (
    base_learning_rate,
    forward_dtype,
    make_accelerator,
    make_ema,
    make_proxies,
    prepare_models,
    step_ema,
)
from sd_memguard.training.distributed_start import (
    check_shared,
    leaving_together,
    main_alone,
    plan_together,
    raise_together,
    silence_non_main,
    told_when_lost,
)
from sd_memguard.training.dry_run import describe_plan, vae_factor
from sd_memguard.training.failures import NonFiniteError, Seen, check_finite, describe_samples, explained_faults
from sd_memguard.training.learning_rate import learning_rate_schedule
from sd_memguard.training.loss import DenoisingLoss, NoiseSampler, dream_exponent, timestep_weights
from sd_memguard.training.optimizer_step import ClippedStep
from sd_memguard.training.plan import Plan, finished_summary, load_class_images
from sd_memguard.training.prior import ClassBatches, ClassImages, generate_class_images
from sd_memguard.training.progress_log import RunLog, summary_text
from sd_memguard.training.ranks import Ranks
from sd_memguard.training.run_state import RunState
from sd_memguard.training.signals import ECHO, Interrupted, StopRequest
from sd_memguard.training.sync import RankSync, Reason
from sd_memguard.training.validation import RoundValidator

logger = logging.getLogger(__name__)

MAX_NONFINITE_STEPS = 5
"""Steps in a row that may be skipped for a loss or gradient that is not finite."""
MAX_OVERFLOWS = 25
"""The same under fp16: each time the scale of the gradients is halved, from 65,536 at the beginning."""


class TrainResult(NamedTuple):
    """What a run has made: its folder, the steps over all proxies, and the closing summary."""

    output_dir: Path
    global_step: int
    summary: dict[str, Any]


def _recognized(config: TrainConfig) -> tuple[TrainConfig, UserError | None]:
    """Return the settings for the kind of the model, and why it is not known: then they serve to join the others."""
    try:
        return recognize(config), None
    except UserError as error:
        if launched_processes() == 1:
            raise
        return config.of_kind("sd"), error


def train(config: TrainConfig) -> TrainResult:
    """Fine-tune as configured and write the run folder.

    Raises:
        UserError: a setting, file or folder that cannot be used; found before a model is loaded.
        NonFiniteError: the losses or gradients of several steps in a row are not finite.
        Interrupted: a signal asked the run to stop; it has saved a checkpoint.
    """
    config, unknown = _recognized(config)
    accelerator = make_accelerator(config) if launched_processes() > 1 else None
    exchange = ProcessGroup(accelerator.device if accelerator else "cpu")
    silence_non_main(exchange)
    raise_together(unknown, exchange)
    plan = plan_together(config, exchange)
    accelerator = accelerator or make_accelerator(plan.config)
    if plan.config.dry_run:
        if exchange.is_main:
            with explained_faults(plan.config):
                print(describe_plan(plan, accelerator))
        return TrainResult(plan.output_dir, 0, {})
    with main_alone(exchange, run_lock(plan.output_dir)), explained_faults(plan.config):
        check_shared(plan.output_dir, exchange)
        with exchange.raise_on_any_rank():
            summary = finished_summary(plan)
        if summary is not None:
            logger.info(
                "%s holds this run finished after %d steps: nothing is left to do; a larger --max_train_steps goes on",
                *(plan.output_dir, summary["global_step"]),
            )
            return TrainResult(plan.output_dir, summary["global_step"], summary)
        if exchange.is_main:
            remove_leftovers(plan.output_dir)
        exchange.barrier("plan")
        if plan.missing_class_images:
            with exchange.raise_on_any_rank():
                if exchange.is_main:
                    generate_class_images(plan, accelerator)
            exchange.barrier("class images")
        trainer = Trainer(plan, accelerator, exchange)
        trainer.resume()
        with (
            leaving_together(exchange),
            StopRequest(echo=ECHO if exchange.size > 1 else 0.0) as stop,
            trainer.log,
            told_when_lost(),
        ):
            trainer.fit(stop)
            return trainer.finish()


class Trainer:
    """One run: the models, the guard, the proxies, and where they stand.

    Args:
        plan: what is to be done.
        accelerator: device, precision and trackers.
        exchange: the processes of the run; by default this one alone.
    """

    def __init__(self, plan: Plan, accelerator: Accelerator, exchange: ProcessGroup | None = None) -> None:
        config = plan.config
        self.ranks = Ranks(exchange or ProcessGroup(alone=True), plan.schedule.num_shards, config.train_batch_size)
        self.plan, self.config, self.schedule, self.accelerator = plan, config, plan.schedule, accelerator
        models = prepare_models(plan, accelerator)
        self.kind = models.kind
        self.unet: UNet2DConditionModel = models.unet
        dtype = forward_dtype(accelerator)
        self.ema = make_ema(self.unet, config, accelerator.device)
        self.proxies = make_proxies(plan, self.unet, self.ema, dtype, accelerator.device, self.ranks)
        self.parameters = list(self.proxies.parameters.values())

        # Images and captions.
        encoders = Encoders(models, accelerator.device, dtype)
        processes = self.ranks.exchange
        self.source = BatchSource(
            plan.samples,
            encoders,
            config,
            plan.seed,
            progress=processes.is_main,
            num_samples_seen=plan.schedule.total_steps * plan.effective_batch_size,
            exchange=processes,
        )
        num_timesteps = models.noise_scheduler.config.num_train_timesteps
        self.class_images = None
        if plan.config.with_prior_preservation:
            samples = load_class_images(config)
            self.class_images = ClassImages(samples, encoders, config, plan.seed, num_timesteps, self.ranks)
        self.noise_sampler = NoiseSampler(
            plan.seed,
            num_timesteps,
            config.noise_offset,
            config.input_perturbation,
            timestep_weights(config, num_timesteps),
        )
        self.loss = DenoisingLoss(models.noise_scheduler, config.snr_gamma, dream_exponent(config))
        self.validator = RoundValidator(plan, self.source, encoders, num_timesteps, is_main=self.ranks.is_main)

        # The guard and the step.
        unusable = torch.ones(plan.samples.num_rows, dtype=torch.bool)
        unusable[plan.samples.sample_ids] = False
        self.guard = SampleGuard(
            plan.guard,
            plan.samples.num_rows,
            num_timesteps=num_timesteps,
            groups=None if plan.samples.groups is None else torch.from_numpy(plan.samples.groups),
            exclude=torch.nonzero(unusable).flatten(),
            device=accelerator.device,
        )
        # Under evaluation mode accelerate prepares the precision alone: no gradients are exchanged between shards.
        self.model = accelerator.prepare_model(self.unet, evaluation_mode=self.ranks.by_shard)
        self.optimizer = accelerator.prepare_optimizer(self.proxies.optimizer)
        self.learning_rate = learning_rate_schedule(
            config.lr_scheduler,
            base_learning_rate(config, plan.batch_size),
            config.lr_warmup_steps,
            self.schedule.total_steps,
            self.schedule.num_shards,
            config.lr_step_rules,
        )
        sources = [self.source, *([] if self.class_images is None else [self.class_images.source])]
        encoders.release(
            vae=all(source.caches_latents for source in sources) and not plan.guard.augments,
            text_encoders=all(source.caches_embeddings for source in sources),
        )

        self.optimizer_step = ClippedStep(accelerator, self.optimizer, self.parameters, config.max_grad_norm)
        self.taken: list[tuple[int, list[Seen], AsyncCPUCopy]] = []
        self.nonfinite_in_a_row = 0
        self.ensemble = Ensemble(self.guard, self.proxies, self.schedule)
        self.records = RunRecords(plan.output_dir, writes=self.ranks.is_main)
        self.scalers = ProxyScalers(accelerator.scaler, self.schedule.num_shards, self.proxies.active)
        self.best = BestModel(plan.output_dir)
        self.state = RunState(plan, self.scalers, self.unet, self.ensemble, self.ranks, self.best)
        self.log = RunLog(accelerator, plan, self.state)

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.ensemble.progress

    # The run.

    def fit(self, stop: StopRequest) -> None:
        """Train to the end: every round, in it every shard, in it every step."""
        progress = self.progress
        self.records.begin(self.plan.record)
        self.records.write_rounds(self.ensemble.rounds)
        silence_non_main(self.ranks.exchange, logging.WARNING)
        self.ranks.stop = stop
        if not progress.global_step:
            self.state.losses_before = self.validator.before_training(self.state, self.ranks, self.loss)
        self.rank_sync = RankSync(self.ranks, self.guard, progress, self.config.checkpointing_steps)
        while not (self.ensemble.is_finished or self.stops_early):
            for shard_index in self.ranks.shards:
                self.train_shard(shard_index, stop)
            while self.ranks.by_shard and self._synchronize(Reason.ROUND_END, stop) is not Reason.ROUND_END:
                pass  # a checkpoint for one that is not there yet
            self.end_round()

    @property
    def stops_early(self) -> bool:
        """Whether ``--early_stopping_patience`` or ``--early_stopping_gap`` ends the run."""
        rounds, config = self.ensemble.rounds, self.config
        is_reached = bool(rounds) and is_gap_reached(rounds[-1], config.early_stopping_gap)
        return is_reached or is_patience_over(rounds, config.early_stopping_patience)

    def train_shard(self, shard_index: int, stop: StopRequest) -> None:
        """Train one proxy on its shard for what is left of its steps in this round."""
        num_steps = self.ensemble.begin_turn(shard_index)
        if num_steps == 0:
            return
        self.scalers.activate(shard_index)
        size, accumulation = self.plan.batch_size, self.config.gradient_accumulation_steps
        upcoming = self.ensemble.upcoming(size, self.source.targets.buckets)
        windows = [
            [part for chunk in islice(upcoming, accumulation) for part in split_by_bucket(chunk)]
            for _ in range(num_steps)
        ]
        batches = self.source.batches([self.ranks.slice_of(part) for window in windows for part in window])
        class_batches: Iterator[ClassBatches] = iter(())
        if self.class_images is not None:
            taken = self.progress.shard_steps[shard_index] * accumulation
            class_batches = self.class_images.batches(shard_index, taken, num_steps * accumulation, size)
        for window in windows:
            class_images = [one for parts in islice(class_batches, accumulation) for one in parts]
            verdicts = self.step(batches, [len(part) for part in window], class_images)
            while (waiting := self.guard.take_augment_batch(size)) is not None:
                self.augmented_step(waiting)
            self.ensemble.advance(self.plan.effective_batch_size)
            self.ensemble.count_step()
            self.log.step(self.progress, verdicts, self.optimizer.param_groups[0]["lr"])
            self._checkpoint_if_due(stop)
        self.check_pending_norms()

    def step(
        self, batches: Iterator[tuple[list[SampleRef], Batch]], sizes: list[int], class_batches: ClassBatches = ()
    ) -> list[Verdict]:
        """Take one optimizer step over some batches, and over class images beside them; return the guard's verdicts.

        The gradient is the mean over the clean samples of all the batches: each batch is divided by the number of all
        samples, and the sum scaled at the end, when the number of clean samples is known.

        Args:
            batches: what comes next.
            sizes: the number of samples, over all processes, of each batch to take.
            class_batches: of class images.
        """
        self._set_learning_rate()
        seen: list[Seen] = []
        for position, size in enumerate(sizes):
            refs, batch = next(batches)
            if not refs and not self.ranks.by_batch:
                self.progress.unreadable_samples += size
                continue
            with self.ranks.accumulates(self.model, last=position == len(sizes) - 1):
                losses, timesteps = self._losses(batch, [sample_address(ref) for ref in refs])
                sample_ids = torch.tensor([ref.sample_id for ref in refs], dtype=torch.int64)
                losses, timesteps, sample_ids = self.ranks.gather_batch(losses, timesteps, sample_ids)
                self._count_forwards(len(sample_ids), dream=True)
                self.progress.unreadable_samples += size - len(sample_ids)
                verdict = self.guard.weigh(losses, timesteps, sample_ids, self.loss.weights(timesteps), wait=False)
                # Where processes share a batch, the mean of their gradients is taken: each counts as many times.
                self.accelerator.backward(verdict.loss_sum / (self.plan.effective_batch_size / self.ranks.slices))
            seen.append(Seen(sample_ids, timesteps, verdict))
        # The only wait for the device in a step: for the forwards, while it works on the backwards.
        verdicts = [one.verdict for one in seen]
        self.guard.count()
        for verdict in verdicts:
            self.ensemble.record(verdict)
        if self.config.debug_loss:
            self.log.image_losses(seen, self.progress.global_step + 1)
        self.check_pending_norms()
        if not all(bool(torch.isfinite(verdict.losses).all()) for verdict in verdicts):
            self.optimizer.zero_grad()
            self.skip_nonfinite_step("loss", seen, self.progress.global_step + 1)
            return verdicts
        num_clean = sum(verdict.num_clean for verdict in verdicts)
        if num_clean == 0:
            self.optimizer.zero_grad()
            self.progress.empty_steps += 1
            return verdicts
        scale = self.plan.effective_batch_size / num_clean
        self._add_class_gradient(class_batches, 1 / scale)
        self._update(scale, seen=seen)
        return verdicts

    def _add_class_gradient(self, batches: ClassBatches, factor: float) -> None:
        """Add the gradient of the class images' mean loss, times a factor that undoes what the update multiplies by."""
        batches = [one for one in batches if self.ranks.count(len(one[0]))]
        number = self.ranks.count(sum(len(refs) for refs, _ in batches))
        for refs, batch in batches:
            assert self.class_images is not None
            losses = self.class_images.losses(self.model, self.loss, refs, batch) if refs else self._no_losses()[0]
            self.accelerator.backward(self.class_images.weight * factor * self.ranks.mean(losses, number))
        self._count_forwards(number, dream=False)

    def augmented_step(self, waiting: AugmentBatch) -> None:
        """Take an extra optimizer step on augmented copies: no AGC, no DREAM, bank and schedule untouched."""
        shard_index = self.guard.shard_index
        number = self.progress.extra_steps[shard_index]
        epoch_index = self.progress.samplers[shard_index].epoch_index
        buckets = self.source.targets.buckets(torch.tensor(waiting.sample_ids), epoch_index).tolist()
        copies = [
            AugmentedCopy(sample_id, (shard_index, number, slot), bucket)
            for slot, (sample_id, bucket) in enumerate(zip(waiting.sample_ids, buckets, strict=True))
        ]
        batches = [
            self.source.augmented(self.ranks.slice_of(part), part[0].bucket, waiting.magnitude)
            for part in split_by_bucket(copies)
        ]
        num_copies = self.ranks.count(sum(len(addresses) for addresses, _ in batches))
        if not num_copies:
            return
        for position, (addresses, batch) in enumerate(batches):
            if not addresses and not self.ranks.by_batch:
                continue
            with self.ranks.accumulates(self.model, last=position == len(batches) - 1):
                losses, timesteps = self._losses(batch, addresses, purpose="augment_", dream=False)
                weights = self.loss.weights(timesteps)
                weighted = losses if weights is None else losses * weights
                # The mean over the copies of all processes, of whose gradients the mean is taken.
                self.accelerator.backward(self.ranks.mean(weighted, num_copies))
        self._count_forwards(num_copies, dream=False)
        self._update(scale=1.0, seen=[])
        self.ensemble.count_augmented()

    def _losses(
        self, batch: Batch, addresses: list[Address], purpose: str = "", *, dream: bool = True
    ) -> tuple[Tensor, Tensor]:
        if not addresses:
            return self._no_losses()
        latents, condition, mask = batch
        timesteps, noise, input_noise = self.noise_sampler.sample(addresses, latents.shape[1:], latents.device, purpose)
        losses = self.loss(self.model, latents, condition, timesteps, noise, input_noise, mask=mask, dream=dream)
        return losses, timesteps

    def _no_losses(self) -> tuple[Tensor, Tensor]:
        """Return the losses of no samples, with a graph: the exchange of gradients waits for every process."""
        channels, factor = self.unet.config.in_channels, vae_factor(self.plan)
        width, height = self.source.targets.sizes[0]
        device = self.accelerator.device
        latents = torch.zeros(1, channels, height // factor, width // factor, device=device)
        condition = self.kind.blank(self.unet, 1, 1, device)
        timesteps = torch.zeros(1, dtype=torch.int64, device=device)
        return self.loss(self.model, latents, condition, timesteps, latents, dream=False)[:0], timesteps[:0]

    def _count_forwards(self, number: int, *, dream: bool) -> None:
        self.progress.image_forwards += number * (2 if dream and self.config.dream_training else 1)

    def _update(self, scale: float, seen: list[Seen]) -> None:
        """Clip the gradients and step, unless they are not finite, which the host learns in ``check_pending_norms``."""
        self.taken.append((self.progress.global_step + 1, seen, self.optimizer_step.step(scale)))
        if self.ema is not None:
            self.check_pending_norms()  # the average does not take in what was skipped
            if self.nonfinite_in_a_row == 0:
                step_ema(self.ema, self.parameters, self.accelerator.device, offload=self.config.offload_ema)

    def check_pending_norms(self) -> None:
        """Learn which of the steps taken since the last call were skipped for a gradient that is not finite."""
        while self.taken:
            step, seen, norm = self.taken.pop(0)
            if not math.isfinite(float(norm.wait())):
                self.skip_nonfinite_step("gradient", seen, step)
            else:
                self.nonfinite_in_a_row = 0

    def skip_nonfinite_step(self, what: str, seen: list[Seen], step: int) -> None:
        """Count a step that is skipped, name its samples, and stop the run when that happens again and again."""
        self.progress.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        is_overflow = what == "gradient" and self.scalers.scaler is not None
        most = MAX_OVERFLOWS if is_overflow else MAX_NONFINITE_STEPS
        if is_overflow and self.nonfinite_in_a_row < most:
            logger.info("step %d is skipped: its gradient overflows in fp16, and the next is scaled by half", step)
        elif self.ranks.is_main or self.ranks.by_shard:  # those that share a batch all know
            named = describe_samples(seen, self.plan.samples)
            logger.warning("step %d is skipped: its %s is not finite (%s)", step, what, named)
        if self.nonfinite_in_a_row >= most:
            raise NonFiniteError(
                f"the {what} of {most} steps in a row was not finite, the last at step {step}; the "
                "weights are those before. Lower `--learning_rate`, use `--mixed_precision bf16` or `no`, or look "
                "at the images; the last checkpoint is untouched"
            )

    def _set_learning_rate(self) -> None:
        rate = self.learning_rate(self.progress.shard_steps[self.guard.shard_index])
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    # The end of a round.

    def end_round(self) -> None:
        """Average the proxies or move samples between shards, validate the aggregate, and record the round."""
        row = self.ensemble.end_round(lambda: self.validator.at_round_end(self.state, self.ranks, self.loss, self.log))
        if self.state.losses_before:
            row["relative_gap"] = relative_gap(row, self.state.losses_before)
        self.records.write_rounds(self.ensemble.rounds)
        self.records.write_samples(self.plan.sample_table, self.guard)
        self.records.write_curves(self.guard.rules)
        if self.config.load_best_model_at_end and row is self._best_round:
            with self.state.aggregate() as unet:
                if unet is not None:
                    self.best.save(unet, self.state.save_adapter)
        if self.ranks.is_main:
            self.log.round(row)
        limit = self.config.early_stopping_gap
        if len(self.ensemble.rounds) == 1 and is_gap_reached(row, limit):
            logger.warning(
                "the relative gap is %.0f%% after the first round, above --early_stopping_gap %s: the model of that "
                "round is kept, since there is none before; a smaller --steps_per_round looks earlier",
                *(100 * row["relative_gap"], limit),
            )
        self.rank_sync.begin_round()

    # Checkpoints.

    def _checkpoint_if_due(self, stop: StopRequest) -> None:
        if self.ranks.by_shard:
            if stop.number or self.rank_sync.checkpoint_is_due:
                self._synchronize(Reason.STOP if stop.number else Reason.CHECKPOINT, stop)
            return
        due = self.progress.global_step % self.config.checkpointing_steps == 0
        signal = self.ranks.signal if self.ranks.by_batch else stop.number
        if due or signal:
            self.check_pending_norms()
            self.state.save_checkpoint()
        if signal:
            self._stop(signal)

    def _synchronize(self, reason: Reason, stop: StopRequest) -> Reason:
        """Meet the processes that train other shards, and do what is decided there."""
        self.check_pending_norms()
        outcome = self.rank_sync.synchronize(reason, stop.number)
        if outcome.reason is not Reason.ROUND_END:
            self.state.save_checkpoint()
        if outcome.reason is Reason.STOP:
            self._stop(outcome.signal)
        return outcome.reason

    def _stop(self, number: int) -> NoReturn:
        if self.ranks.is_main:
            logger.warning(
                "%s: saved step %d; go on with the same command and --resume_from_checkpoint latest",
                *(Signals(number).name, self.progress.global_step),
            )
        raise Interrupted(128 + number)

    def resume(self) -> None:
        """Go on from the checkpoint that was asked for; without one, begin.

        Raises:
            CheckpointError: it is missing or damaged, or settings that shape the run have changed.
        """
        self.state.resume()

    # The end of the run.

    def finish(self) -> TrainResult:
        """Write the pipeline, generate, upload, and say how it went."""
        config, output_dir, progress = self.config, self.plan.output_dir, self.progress
        self._checkpoint_before_export()
        with self._result() as unet:
            if unet is not None:
                check_finite(unet)
                (self.state.save_adapter if self._keeps_last else self.best.copy_adapter)(self.records.folder)
                write_pipeline(
                    self.plan.pipeline,
                    unet,
                    output_dir,
                    config.variant,
                    prediction_type=config.prediction_type,
                    replaced=replaced_parts(config),
                )
        if not self.ranks.is_main:
            return TrainResult(output_dir, progress.global_step, self._summary())
        self.records.write_samples(self.plan.sample_table, self.guard)
        exports = export_at_end(TrainedRun(output_dir, config, self.schedule.num_shards))
        summary = {**self._summary(), **exports.summary()}
        self.records.write_summary(summary)
        shutil.rmtree(self.records.folder / PROXIES_FOLDER, ignore_errors=True)  # the offloaded ones, if on disk
        self.best.remove()
        self.log.end(summary_text(summary, self.guard.actions, output_dir))
        if config.push_to_hub:
            push_to_hub(output_dir, config, self.plan.guard, summary, self.plan.published_prompts)
        exports.raise_failures()
        return TrainResult(output_dir, progress.global_step, summary)

    @property
    def _best_round(self) -> dict[str, Any] | None:
        return best_round(self.ensemble.rounds, self.config.early_stopping_gap)

    @property
    def _kept(self) -> dict[str, Any] | None:
        """The round whose model is the result: the best one if asked for, else the last."""
        rounds = self.ensemble.rounds
        best = self._best_round if self.config.load_best_model_at_end else None
        return best or (rounds[-1] if rounds else None)

    @property
    def _keeps_last(self) -> bool:
        return self._kept is self.ensemble.rounds[-1]

    @contextmanager
    def _result(self) -> Iterator[UNet2DConditionModel | None]:
        """Give the UNet to export, to the main process alone."""
        if self._keeps_last:
            with self.state.aggregate() as unet:
                yield unet
        else:
            yield self.best.load() if self.ranks.is_main else None

    def _checkpoint_before_export(self) -> None:
        """Save the last steps, which a full disk would cost now; a run too short for any checkpoint does without."""
        last = self.state.last_saved_step
        if last < self.progress.global_step >= self.config.checkpointing_steps:
            self.state.save_checkpoint()

    def _summary(self) -> dict[str, Any]:
        speed = self.log.images_per_second(self.progress)
        summary = run_summary(self.ensemble, self.plan.sample_table, speed, self._kept)
        return {**summary, "stopped_early": not self.ensemble.is_finished}
