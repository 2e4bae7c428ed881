"""Puts the guard into a loop: the gate, proxies, rounds, dataloader, and hooks for steps and checkpoints."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.core.shards import count_images
from sd_memguard.defaults import resolve_settings
from sd_memguard.ensemble import Ensemble
from sd_memguard.errors import LoopError
from sd_memguard.plugin import checkpoint
from sd_memguard.plugin.augment import Augmenter, AugmentFunction, find_augmenter
from sd_memguard.plugin.backends import (
    LoopBackend,
    plain_optimizer,
    sum_over_processes,
)
from sd_memguard.plugin.checks import check_ema, check_loader, check_model, check_order, check_steps
from sd_memguard.plugin.dataloaders import GuardedLoader, LabelledLoader, labelled_loader
from sd_memguard.plugin.gate import RowGate, grad_scale_of
from sd_memguard.plugin.loop_driver import LoopDriver
from sd_memguard.plugin.lora_export import whole_adapter
from sd_memguard.plugin.lr_table import LRTable, tabulate
from sd_memguard.plugin.trainable import Adapter, find_adapter, make_proxies, trained_parameters
from sd_memguard.proxies.lora import LoraProxies
from sd_memguard.proxies.swap import is_schedule_free
from sd_memguard.sample_guard import SampleGuard

logger = logging.getLogger(__name__)

STEPS_PER_ROW = 500
"""Steps of a row of the records where nobody knows how long the run is."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """What a loop may tell the guard besides its objects; see ``sd_memguard.MemorizationGuard.attach``."""

    total_steps: int | None = None
    gradient_accumulation_steps: int = 1
    models: Sequence[nn.Module] = ()
    ema: Any = None
    augment: AugmentFunction | None = None
    store_dir: str | Path | None = None
    loss_weight: Callable[[Tensor], Tensor] | None = None
    timestep_argument: str | None = None


@dataclass
class Loop:
    """A loop's objects, as they are before accelerate prepares them; ``dataloader`` None where no ids are known."""

    denoiser: nn.Module
    optimizer: Any
    dataloader: Any
    lr_scheduler: Any
    backend: LoopBackend
    options: LoopOptions

    @property
    def models(self) -> list[nn.Module]:
        """What the optimizer trains."""
        return [self.denoiser, *self.options.models]


@dataclass
class LoopPlan:
    """What the guard does in a loop: the rounds, whether the loop's own order stays, and what the user should know."""

    schedule: RoundSchedule
    keeps_order: bool = True
    augmenter: Augmenter | None = None
    notices: list[str] = field(default_factory=list)


def plan_loop(guard: SampleGuard, loop: Loop) -> LoopPlan:
    """Check a loop, resolve the number of shards, and say what the guard will do; nothing in the loop is changed.

    With one shard the loop keeps its own order, unless duplicates have to count as one image, or augmented copies have
    to be trained, and its batches can be formed again.

    Raises:
        LoopError: something in the loop is not what the guard relies on.
    """
    check_model(loop.denoiser)
    if loop.dataloader is None:
        return _plan_without_ids(guard)
    check_loader(guard, loop.dataloader)
    notices: list[str] = []
    num_images, num_epochs = _length(guard, loop)
    if guard.config.num_shards == "auto":
        guard.split(len(guard.plan.assignment), num_epochs if num_epochs is not None else 0.0)
    if guard.num_shards > 1:
        try:
            _check_ensemble(guard, loop)
        except LoopError as reason:
            if guard.config.num_shards != "auto":
                raise
            num_shards = guard.num_shards
            guard.keep_one_shard()
            notices.append(f"one model is trained, and not {num_shards} proxies: {reason}")
    plan = LoopPlan(_plan_rounds(guard, loop, num_images, num_epochs), notices=notices)
    _plan_order(guard, loop, plan)
    if guard.groups is None and guard.config.group_duplicates != "off" and not guard.is_neutral:
        notices.append(
            "near-duplicates are not known, so that each counts as an image of its own: give the guard "
            "`groups=sd_memguard.find_duplicates(images)`, or leave duplicates out of the dataset "
            "(`sd-memguard check`) and set `group_duplicates='off'`"
        )
    return plan


def _plan_without_ids(guard: SampleGuard) -> LoopPlan:
    if guard.has_ids:
        raise LoopError(
            "the guard was made with `num_samples`, and without the dataloader nobody says which samples a batch is "
            "of; give `attach` the dataloader, or make the guard without `num_samples`"
        )
    if guard.config.num_shards not in ("auto", 1):
        raise LoopError(
            f"the guard has `num_shards={guard.config.num_shards}`, and without a dataloader there is nothing to "
            "split; give `attach` the dataloader and the guard `num_samples`, or set `num_shards=1`"
        )
    steps = guard.config.steps_per_round
    return LoopPlan(RoundSchedule(sys.maxsize, 1, STEPS_PER_ROW if steps == "auto" else steps))


def _length(guard: SampleGuard, loop: Loop) -> tuple[int, float | None]:
    """Return the number of distinct images, and how often one model would see each, where the loop says its length."""
    num_images = count_images(len(loop.dataloader.dataset), guard.groups)
    options = loop.options
    if options.total_steps is None:
        return num_images, None
    samples_per_step = _batch_size(loop.dataloader) * options.gradient_accumulation_steps * loop.backend.num_processes
    return num_images, options.total_steps * samples_per_step / num_images


def _batch_size(dataloader: Any) -> int:
    size = dataloader.batch_size or getattr(dataloader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else 1


def _check_ensemble(guard: SampleGuard, loop: Loop) -> None:
    """Refuse a loop in which proxies cannot take turns.

    Raises:
        LoopError: says what is in the way.
    """
    if loop.backend.num_processes > 1:
        raise LoopError(
            f"{loop.backend.num_processes} processes train together, and proxies take turns in one; launch with "
            "`--num_processes 1`, or set `num_shards=1`"
        )
    check_steps(guard, loop.options.total_steps)
    check_order(loop.dataloader)
    optimizer = plain_optimizer(loop.optimizer)
    if is_schedule_free(optimizer):
        raise LoopError(
            f"{type(optimizer).__name__} is schedule-free: the weights between its steps are no result that proxies "
            "could be averaged from; set `num_shards=1`, or take another optimizer"
        )
    parameters = trained_parameters(optimizer, loop.models)
    check_ema(loop.options.ema, len(parameters), find_adapter(parameters, loop.models))


def _plan_rounds(guard: SampleGuard, loop: Loop, num_images: int, num_epochs: float | None) -> RoundSchedule:
    """Return the rounds; of one shard without a number of steps they have no end."""
    total_steps = loop.options.total_steps
    if total_steps is None:
        steps = guard.config.steps_per_round
        return RoundSchedule(sys.maxsize, 1, STEPS_PER_ROW if steps == "auto" else steps)
    check_steps(guard, total_steps)
    return resolve_settings(
        guard.config, num_images=num_images, num_epochs=num_epochs, total_steps=lambda _: total_steps
    )[1]


def _plan_order(guard: SampleGuard, loop: Loop, plan: LoopPlan) -> None:
    """Decide who forms the batches, and who makes augmented copies."""
    duplicates = _has_unequal_groups(guard)
    plan.keeps_order = guard.num_shards == 1 and not guard.augments and not duplicates
    if guard.num_shards == 1 and not plan.keeps_order:
        try:
            if loop.backend.num_processes > 1:
                raise LoopError(f"{loop.backend.num_processes} processes share its batches")
            check_order(loop.dataloader)
        except LoopError as reason:
            plan.keeps_order = True
            if duplicates:
                plan.notices.append(
                    f"each near-duplicate counts as an image of its own: the loop's order stays, since {reason}. "
                    "Leave duplicates out of the dataset (`sd-memguard check`)"
                )
            if guard.augments:
                guard.disable_augmentation()
                plan.notices.append(f"no augmented copies are trained: the loop's order stays, since {reason}")
    if guard.augments:
        plan.augmenter = _find_augmenter(guard, loop, plan.notices)
        plan.keeps_order = guard.num_shards == 1 and plan.augmenter is None and not duplicates


def _has_unequal_groups(guard: SampleGuard) -> bool:
    """Say whether some images come more often than others; repeated alike, there is nothing to balance."""
    if guard.balanced_groups is None:
        return False
    sizes = guard.balanced_groups.unique(return_counts=True)[1]
    return bool((sizes != sizes[0]).any())


def _find_augmenter(guard: SampleGuard, loop: Loop, notices: list[str]) -> Augmenter | None:
    found = find_augmenter(loop.dataloader.dataset, loop.dataloader.collate_fn, loop.options.augment, guard.seed)
    if isinstance(found, str):
        guard.disable_augmentation()
        notices.append(
            f"no augmented copies are trained: {found}. Samples above the skip threshold are trained as they are; "
            "`augment=` takes a function that makes a batch of augmented copies"
        )
        return None
    return found


class Attachment:
    """The guard's presence in one loop.

    Args:
        guard: the guard.
        loop: the loop's objects.
        plan: what is to be done in it.
        denoiser: the model that the loop calls, as accelerate has made it.
        prepared_loader: the loop's loader with labelled batches, where its order stays.

    Attributes:
        driver: pushes the ensemble through the loop.
        loader: what the loop iterates over in place of its own dataloader; None without one.
        notices: what a user should know of, in sentences.
    """

    def __init__(
        self, guard: SampleGuard, loop: Loop, plan: LoopPlan, denoiser: nn.Module, prepared_loader: Any = None
    ) -> None:
        self.guard, self.unet, self.notices = guard, loop.denoiser, plan.notices
        plain, options = plain_optimizer(loop.optimizer), loop.options
        several = guard.num_shards > 1
        # Of one shard nothing is exchanged: whatever the optimizer trains, it needs neither names nor copies.
        parameters = trained_parameters(plain, loop.models) if several or options.ema is not None else {}
        self.adapter: Adapter | None = find_adapter(parameters, loop.models) if several else None
        check_ema(options.ema, len(parameters), self.adapter)
        lr_table: LRTable | None = None
        if several and loop.lr_scheduler is not None:
            lr_table = tabulate(loop.lr_scheduler, plain, plan.schedule.total_steps + guard.num_shards)
        guard.to(next(denoiser.parameters()).device)
        proxies = make_proxies(parameters, plain, guard.num_shards, self.adapter, options.ema, options.store_dir)
        self.ensemble = Ensemble(guard, proxies, plan.schedule)
        has_loader = loop.dataloader is not None
        self.driver = LoopDriver(self.ensemble, plain, loop.backend, lr_table, has_loader=has_loader)
        self._put_gate_on(denoiser, plain, loop)
        if options.ema is not None:
            _skip_ema_of_empty_steps(options.ema, self.driver)
        self.loader: Any = None
        if has_loader and plan.keeps_order:
            inner = labelled_loader(loop.dataloader) if prepared_loader is None else prepared_loader
            self.loader = LabelledLoader(inner, self.driver)
        elif has_loader:
            self.loader = GuardedLoader(loop.dataloader, self.driver, loop.backend, plan.augmenter)

    def _put_gate_on(self, denoiser: nn.Module, optimizer: Optimizer, loop: Loop) -> None:
        """Put the gate on; a model without a timestep can be guarded by ``weigh`` alone."""
        scaler = loop.backend.grad_scaler()
        try:
            self.driver.gate = RowGate(
                denoiser,
                optimizer,
                self.driver.judge,
                bins=self.guard.bins,
                grad_scale=None if scaler is None else grad_scale_of(scaler),
                sum_over_processes=sum_over_processes if loop.backend.num_processes > 1 else None,
                loss_weight=loop.options.loss_weight,
                timestep_argument=loop.options.timestep_argument,
                on_step=self.driver.on_window,
            )
        except LoopError as reason:
            if loop.dataloader is None:
                raise
            self.driver.why_no_gate = f" (without it: {reason})"

    @contextmanager
    def averaged(self, rank: int | None) -> Iterator[None]:
        """Put the aggregate in the model for a while, see ``sd_memguard.MemorizationGuard.averaged``."""
        driver, ensemble = self.driver, self.ensemble
        if not driver.losses_seen and driver.restore is None and not ensemble.progress.global_step:
            raise LoopError(
                "the guard was made but has seen no losses, so that nothing was guarded: train the model that it was "
                "given, with the optimizer that it was given"
            )
        driver.advance_turn()
        self._check_all_trained()
        if self.adapter is None or not isinstance(ensemble.proxies, LoraProxies) or self.guard.num_shards == 1:
            with ensemble.averaged():
                yield
            return
        with whole_adapter(ensemble.proxies, self.adapter, self.guard.aggregation_weights(), rank) as fit:
            logger.info("the adapter has rank %d and misses %.2g of the change", fit.rank, fit.relative_error)
            yield

    def _check_all_trained(self) -> None:
        """Refuse to average proxies of which some were never trained.

        Raises:
            LoopError: says which, and how many steps were announced and taken.
        """
        progress = self.ensemble.progress
        untrained = [str(k) for k, steps in enumerate(progress.shard_steps) if steps == 0]
        if untrained:
            raise LoopError(
                f"the loop has announced {self.ensemble.schedule.total_steps} steps as `total_steps` and has taken "
                f"{progress.global_step}, so that the proxies of shards {', '.join(untrained)} were never trained, and "
                "the mean of all would be worth little; announce as many steps as the loop takes"
            )


def attach(guard: SampleGuard, loop: Loop) -> Attachment:
    """Put the guard into a plain torch loop."""
    return Attachment(guard, loop, plan_loop(guard, loop), loop.denoiser)


def prepare(
    guard: SampleGuard,
    accelerator: Any,
    loop: Loop,
    objects: Sequence[Any],
    *,
    plan: LoopPlan | None = None,
    call: Callable[..., Any] | None = None,
    **settings: Any,
) -> tuple[Attachment, list[Any]]:
    """Prepare a loop's objects by accelerate and put the guard in.

    Args:
        guard: the guard.
        accelerator: the loop's.
        loop: the loop's objects, with the backend of this accelerator.
        objects: what is to be prepared, in the loop's order.
        plan: what ``plan_loop`` has returned, where that was called before.
        call: prepares, by default ``accelerator.prepare``.
        settings: further arguments of it.

    Returns:
        The attachment; the prepared objects, with the guard's loader in the place of the loop's.
    """
    plan = plan_loop(guard, loop) if plan is None else plan
    given = list(objects)
    if loop.dataloader is not None:
        position = next(i for i, part in enumerate(given) if part is loop.dataloader)
        # accelerate keeps the loop's own sampler; what goes shard by shard needs nothing from it
        given[position] = labelled_loader(loop.dataloader) if plan.keeps_order else None
    prepared = (call or accelerator.prepare)(*given, **settings)
    prepared = [prepared] if len(given) == 1 else list(prepared)
    by_id = {id(part): new for part, new in zip(objects, prepared, strict=True)}
    denoiser = by_id.get(id(loop.denoiser), loop.denoiser)
    loop.lr_scheduler = by_id.get(id(loop.lr_scheduler), loop.lr_scheduler)
    inner = None if loop.dataloader is None else prepared[position]
    attachment = Attachment(guard, loop, plan, denoiser, inner)
    if loop.dataloader is not None:
        prepared[position] = attachment.loader
    driver = attachment.driver
    accelerator.skip_first_batches = _skipping(attachment, accelerator.skip_first_batches)
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: checkpoint.save(driver, Path(folder)) if accelerator.is_main_process else None
    )
    accelerator.register_load_state_pre_hook(lambda models, folder: checkpoint.announce(driver, Path(folder)))
    return attachment, prepared


def _skipping(attachment: Attachment, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return what skips batches after a resume: of the loop's order; shards go on by themselves."""

    def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
        if dataloader is not attachment.loader or dataloader is None:
            return plain(dataloader, num_batches)
        if isinstance(dataloader, LabelledLoader):
            return LabelledLoader(plain(dataloader.inner, num_batches), attachment.driver)
        return dataloader

    return skip_first_batches


def _skip_ema_of_empty_steps(ema: Any, driver: LoopDriver) -> None:
    """Leave the EMA alone after a step that was not taken, as it would otherwise count as one."""
    step = ema.step

    def step_if_stepped(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs) if driver.stepped else None

    ema.step = step_if_stepped
