"""Puts the guard into a loop: proxies, rounds, dataloader, and hooks for steps and checkpoints."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.core.shards import count_images
from sd_memguard.defaults import resolve_settings
from sd_memguard.ensemble import Ensemble
from sd_memguard.errors import LoopError
from sd_memguard.plugin import checkpoint
from sd_memguard.plugin.augment import Augmenter, AugmentFunction, find_augmenter
from sd_memguard.plugin.backends import AccelerateBackend, LoopBackend, PlainBackend, plain_optimizer
from sd_memguard.plugin.checks import check_ema, check_loader, check_model, check_steps
from sd_memguard.plugin.dataloaders import GuardedLoader, LabelledLoader, labelled_loader
from sd_memguard.plugin.loop_driver import LoopDriver
from sd_memguard.plugin.lora_export import whole_adapter
from sd_memguard.plugin.lr_table import LRTable, tabulate
from sd_memguard.plugin.trainable import Adapter, find_adapter, make_proxies, trained_parameters
from sd_memguard.proxies.lora import LoraProxies
from sd_memguard.sample_guard import SampleGuard

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """What a loop may tell the guard besides its objects; see ``sd_memguard.MemorizationGuard.attach``."""

    total_steps: int | None = None
    gradient_accumulation_steps: int = 1
    models: Sequence[nn.Module] = ()
    ema: Any = None
    augment: AugmentFunction | None = None
    store_dir: str | Path | None = None


class Attachment:
    """The guard's presence in one loop.

    Attributes:
        driver: pushes the ensemble through the loop.
        loader: what the loop iterates over in place of its own dataloader.
        notices: what a user should know of, in sentences.
    """

    def __init__(
        self,
        guard: SampleGuard,
        models: Sequence[nn.Module],
        optimizer: Any,
        dataloader: Any,
        lr_scheduler: Any,
        backend: LoopBackend,
        options: LoopOptions,
        prepared_loader: Any = None,
    ) -> None:
        self.guard, self.unet = guard, models[0]
        plain = plain_optimizer(optimizer)
        parameters = trained_parameters(plain, models)
        self.adapter: Adapter | None = find_adapter(parameters, models)
        check_ema(options.ema, len(parameters), self.adapter)
        schedule = plan_rounds(guard, dataloader, options)
        lr_table: LRTable | None = None
        if guard.num_shards > 1 and lr_scheduler is not None:
            lr_table = tabulate(lr_scheduler, plain, schedule.total_steps + guard.num_shards)
        for rule in guard.rules:
            rule.to(next(self.unet.parameters()).device)
        proxies = make_proxies(parameters, plain, guard.num_shards, self.adapter, options.ema, options.store_dir)
        self.ensemble = Ensemble(guard, proxies, schedule)
        self.driver = LoopDriver(self.ensemble, plain, backend, lr_table)
        if options.ema is not None:
            _skip_ema_of_empty_steps(options.ema, self.driver)
        self.notices: list[str] = _notices(guard)
        self.loader: Any
        if guard.is_neutral:
            inner = labelled_loader(dataloader) if prepared_loader is None else prepared_loader
            self.loader = LabelledLoader(inner, self.driver)
        else:
            self.loader = GuardedLoader(dataloader, self.driver, backend, self._find_augmenter(dataloader, options))

    def _find_augmenter(self, dataloader: DataLoader, options: LoopOptions) -> Augmenter | None:
        guard = self.guard
        if not guard.augments:
            return None
        found = find_augmenter(dataloader.dataset, dataloader.collate_fn, options.augment, guard.seed)
        if isinstance(found, str):
            guard.disable_augmentation()
            self.notices.append(
                f"no augmented copies are trained: {found}. Samples above the skip threshold are trained as they are; "
                "`augment=` takes a function that makes a batch of augmented copies"
            )
            return None
        return found

    @contextmanager
    def averaged(self, rank: int | None) -> Iterator[None]:
        """Put the aggregate in the model for a while, see ``sd_memguard.MemorizationGuard.averaged``."""
        driver, ensemble = self.driver, self.ensemble
        if not driver.losses_seen and driver.restore is None and not ensemble.progress.global_step:
            raise LoopError(
                "the guard was made but has seen no losses, so that nothing was guarded: call "
                "`guard.weigh(losses, timesteps, batch['sample_id'])` on every batch and backward `verdict.loss`"
            )
        driver.advance_turn()
        if self.adapter is None or not isinstance(ensemble.proxies, LoraProxies) or self.guard.num_shards == 1:
            with ensemble.averaged():
                yield
            return
        with whole_adapter(ensemble.proxies, self.adapter, self.guard.aggregation_weights(), rank) as fit:
            logger.info("the adapter has rank %d and misses %.2g of the change", fit.rank, fit.relative_error)
            yield


def plan_rounds(guard: SampleGuard, dataloader: Any, options: LoopOptions) -> RoundSchedule:
    """Return the rounds of a loop, with ``auto`` resolved by its length; without a number of steps there is no end.

    Raises:
        LoopError: the run is too short for the shards, or of unknown length with several.
    """
    num_samples = len(dataloader.dataset)
    num_images = count_images(num_samples, guard.groups)
    num_epochs = None
    if options.total_steps is not None:
        samples_per_step = (dataloader.batch_size or 1) * options.gradient_accumulation_steps
        num_epochs = options.total_steps * samples_per_step / num_images
    if guard.config.num_shards == "auto":
        guard.split(num_samples, num_epochs if num_epochs is not None else 0.0)
    check_steps(guard, options.total_steps)
    if options.total_steps is None:
        return RoundSchedule(sys.maxsize, 1, sys.maxsize)
    total_steps = options.total_steps
    return resolve_settings(
        guard.config, num_images=num_images, num_epochs=num_epochs, total_steps=lambda _: total_steps
    )[1]


def _notices(guard: SampleGuard) -> list[str]:
    """Return what the guard cannot do in this loop, and what the user can do about it."""
    if guard.groups is None and guard.config.group_duplicates != "off" and not guard.is_neutral:
        return [
            "near-duplicates are not known, so that each counts as an image of its own: give the guard "
            "`groups=sd_memguard.find_duplicates(images)`, or set `group_duplicates='off'`"
        ]
    return []


def attach(
    guard: SampleGuard, unet: Any, optimizer: Any, dataloader: Any, lr_scheduler: Any, options: LoopOptions
) -> Attachment:
    """Put the guard into a plain torch loop."""
    _check(guard, unet, dataloader, options)
    return Attachment(guard, [unet, *options.models], optimizer, dataloader, lr_scheduler, PlainBackend(), options)


def prepare(
    guard: SampleGuard,
    accelerator: Any,
    unet: Any,
    optimizer: Any,
    dataloader: Any,
    lr_scheduler: Any,
    options: LoopOptions,
) -> tuple[Attachment, list[Any]]:
    """Prepare a loop's objects by accelerate and put the guard in.

    Returns:
        The attachment; the prepared UNet, further models, optimizer, dataloader and schedule, in this order.
    """
    backend = AccelerateBackend(accelerator)
    _check(guard, unet, dataloader, options)
    objects = [unet, *options.models, optimizer]
    if guard.is_neutral:  # accelerate keeps the loop's own sampler
        objects.append(labelled_loader(dataloader))
    if lr_scheduler is not None:
        objects.append(lr_scheduler)
    prepared = list(accelerator.prepare(*objects))
    schedule = prepared.pop() if lr_scheduler is not None else None
    loader = prepared.pop() if guard.is_neutral else None
    *models, prepared_optimizer = prepared
    bare = [accelerator.unwrap_model(model) for model in models]
    attachment = Attachment(guard, bare, prepared_optimizer, dataloader, schedule, backend, options, loader)
    driver = attachment.driver
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: checkpoint.save(driver, Path(folder)))
    accelerator.register_load_state_pre_hook(lambda models, folder: checkpoint.announce(driver, Path(folder)))
    return attachment, [*models, prepared_optimizer, attachment.loader, schedule]


def _check(guard: SampleGuard, unet: Any, dataloader: Any, options: LoopOptions) -> None:
    check_model(unet)
    check_loader(guard, dataloader, keeps_order=guard.is_neutral)


def _skip_ema_of_empty_steps(ema: Any, driver: LoopDriver) -> None:
    """Leave the EMA alone after a step that was not taken, as it would otherwise count as one."""
    step = ema.step

    def step_if_stepped(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs) if driver.stepped else None

    ema.step = step_if_stepped
