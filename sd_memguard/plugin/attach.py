"""Puts the guard into a loop: proxies, rounds, dataloader, and hooks for steps and checkpoints."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader

from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.errors import LoopError
from sd_memguard.plugin import checkpoint
from sd_memguard.plugin.augment import Augmenter, AugmentFunction, find_augmenter
from sd_memguard.plugin.backends import AccelerateBackend, LoopBackend, PlainBackend, plain_optimizer
from sd_memguard.plugin.checks import check_ema, check_loader, check_model, check_steps
from sd_memguard.plugin.dataloaders import GuardedLoader, LabelledLoader, labelled_loader
from sd_memguard.plugin.loop_driver import Rounds
from sd_memguard.plugin.lora_export import whole_adapter
from sd_memguard.plugin.lr_table import LRTable, tabulate
from sd_memguard.plugin.trainable import Adapter, find_adapter, make_proxies, trained_parameters
from sd_memguard.proxies.lora import LoraProxies

if TYPE_CHECKING:
    from sd_memguard.guard import MemorizationGuard

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """What a loop may tell the guard besides its objects; see ``sd_memguard.MemorizationGuard.attach``."""

    total_steps: int | None = None
    models: Sequence[nn.Module] = ()
    ema: Any = None
    augment: AugmentFunction | None = None
    store_dir: str | Path | None = None


class Attachment:
    """The guard's presence in one loop.

    Attributes:
        rounds: where the loop stands.
        loader: what the loop iterates over in place of its own dataloader.
        notices: what a user should know of, in sentences.
    """

    def __init__(
        self,
        guard: "MemorizationGuard",
        models: Sequence[nn.Module],
        optimizer: Any,
        dataloader: Any,
        lr_scheduler: Any,
        host: LoopBackend,
        options: LoopOptions,
        prepared_loader: Any = None,
    ) -> None:
        self.guard, self.unet = guard, models[0]
        plain = plain_optimizer(optimizer)
        parameters = trained_parameters(plain, models)
        self.adapter: Adapter | None = find_adapter(parameters, models)
        check_ema(options.ema, len(parameters), self.adapter)
        num_shards = guard.num_shards
        schedule = plan_rounds(guard, options.total_steps)
        lr_table: LRTable | None = None
        if num_shards > 1 and lr_scheduler is not None:
            lr_table = tabulate(lr_scheduler, plain, schedule.total_steps + num_shards)
        for bank in guard.banks:
            bank.to(next(self.unet.parameters()).device)
        self.proxies = make_proxies(parameters, plain, num_shards, self.adapter, options.ema, options.store_dir)
        self.rounds = Rounds(guard, self.proxies, schedule, plain, host, lr_table)
        if options.ema is not None:
            _skip_ema_of_empty_steps(options.ema, self.rounds)
        self.notices: list[str] = []
        self.loader: Any
        if guard.is_neutral:
            inner = labelled_loader(dataloader) if prepared_loader is None else prepared_loader
            self.loader = LabelledLoader(inner, self.rounds)
        else:
            self.loader = GuardedLoader(dataloader, self.rounds, host, self._find_augmenter(dataloader, options))

    def _find_augmenter(self, dataloader: DataLoader, options: LoopOptions) -> Augmenter | None:
        guard = self.guard
        if not guard.augments:
            return None
        found = find_augmenter(dataloader.dataset, dataloader.collate_fn, options.augment, guard.seed)
        if isinstance(found, str):
            guard.augment_threshold = 0.0
            self.notices.append(
                f"no augmented copies are trained: {found}. Samples above the skip threshold are trained as they are; "
                "`augment=` takes a function that makes a batch of augmented copies"
            )
            return None
        return found

    @contextmanager
    def averaged(self, rank: int | None) -> Iterator[None]:
        """Put the aggregate in the model for a while, see ``sd_memguard.MemorizationGuard.averaged``."""
        if not self.rounds.losses_seen and self.rounds.restore is None and not self.rounds.progress.global_step:
            raise LoopError(
                "the guard was made but has seen no losses, so that nothing was guarded: call "
                "`guard.weigh(losses, timesteps, batch['sample_id'])` on every batch and backward `verdict.loss`"
            )
        self.rounds.settle()
        weights = self.guard.aggregation_weights()
        if self.adapter is None or not isinstance(self.proxies, LoraProxies) or self.guard.num_shards == 1:
            with self.proxies.averaged(weights):
                yield
            return
        with whole_adapter(self.proxies, self.adapter, weights, rank) as fit:
            logger.info("the adapter has rank %d and misses %.2g of the change", fit.rank, fit.relative_error)
            yield


def plan_rounds(guard: "MemorizationGuard", total_steps: int | None) -> RoundSchedule:
    """Return the rounds of a loop; without a number of steps (one shard) there is one that does not end."""
    if total_steps is None:
        return RoundSchedule(sys.maxsize, 1, sys.maxsize)
    return RoundSchedule.plan(total_steps, guard.num_shards, guard.config.steps_per_round, guard.redistributes)


def attach(
    guard: "MemorizationGuard", unet: Any, optimizer: Any, dataloader: Any, lr_scheduler: Any, options: LoopOptions
) -> Attachment:
    """Put the guard into a plain torch loop."""
    _check(guard, unet, dataloader, options)
    return Attachment(guard, [unet, *options.models], optimizer, dataloader, lr_scheduler, PlainBackend(), options)


def prepare(
    guard: "MemorizationGuard",
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
    host = AccelerateBackend(accelerator)
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
    attachment = Attachment(guard, bare, prepared_optimizer, dataloader, schedule, host, options, loader)
    rounds = attachment.rounds
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: checkpoint.save(rounds, Path(folder)))
    accelerator.register_load_state_pre_hook(lambda models, folder: checkpoint.announce(rounds, Path(folder)))
    return attachment, [*models, prepared_optimizer, attachment.loader, schedule]


def _check(guard: "MemorizationGuard", unet: Any, dataloader: Any, options: LoopOptions) -> None:
    check_model(unet)
    check_loader(guard, dataloader, keeps_order=guard.is_neutral)
    check_steps(guard, options.total_steps)


def _skip_ema_of_empty_steps(ema: Any, rounds: Rounds) -> None:
    """Leave the EMA alone after a step that was not taken, as it would otherwise count as one."""
    step = ema.step

    def step_if_stepped(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs) if rounds.stepped else None

    ema.step = step_if_stepped
