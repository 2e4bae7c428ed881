"""MemorizationGuard: the one object a training loop talks to."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_memguard.config import GuardConfig
from sd_memguard.core.decision import Verdict
from sd_memguard.errors import LoopError
from sd_memguard.plugin.attach import Attachment, Loop, LoopOptions, attach, prepare
from sd_memguard.plugin.backends import AccelerateBackend, PlainBackend
from sd_memguard.plugin.gate import unwrap
from sd_memguard.sample_guard import SampleGuard

logger = logging.getLogger(__name__)


class MemorizationGuard(SampleGuard):
    """The guard in a training loop that somebody else has written; see `SampleGuard` for what it decides, and how.

    ``prepare`` (accelerate) or ``attach`` (plain torch) put it in the loop, with proxies, rounds, averages and
    checkpoints. From then on each sample is judged by the gradient at the denoiser's output, or by its loss in a loop
    that calls ``weigh``. ``averaged`` gives the model to generate with and to save.

    Args:
        config: the guard's settings.
        num_samples: number of samples of the dataset, ids ``0 .. num_samples-1``; None for one model without ids.
        num_timesteps: number of timesteps of the noise schedule.
        groups: (num_samples,) int64, near-duplicates share a number; `sd_memguard.find_duplicates` returns it.
        exclude: sample ids that are not trained on, e.g. unreadable images.
        augments: whether the loop trains augmented copies; if not there are two bands.
        device: where the sample rules' state lives.

    Raises:
        ValueError: more shards than usable samples or groups, or groups while ``group_duplicates`` is off.

    >>> guard = MemorizationGuard(GuardConfig(num_shards=2, bank_mode="paper", seed=0), num_samples=10)
    >>> verdict = guard.weigh(torch.ones(2), torch.tensor([5, 9]), torch.tensor([0, 1]))
    >>> verdict.num_clean, verdict.loss
    (2, tensor(1.))
    """

    def __init__(
        self,
        config: GuardConfig,
        num_samples: int | None = None,
        *,
        num_timesteps: int = 1000,
        groups: Tensor | None = None,
        exclude: Tensor | None = None,
        augments: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            config,
            num_samples,
            num_timesteps=num_timesteps,
            groups=groups,
            exclude=exclude,
            augments=augments,
            device=device,
        )
        self.attachment: Attachment | None = None

    def weigh(
        self,
        losses: Tensor,
        timesteps: Tensor,
        sample_ids: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        wait: bool = True,
    ) -> Verdict:
        """Judge a batch and return what to backward; see ``SampleGuard.judge``.

        In a loop that the guard is in, the batch must be the one that its dataloader gave out last. A loop that weighs
        one batch weighs all: the gate on the denoiser is taken out.

        Raises:
            ValueError: the shapes differ, or a sample is not of this dataset.
            LoopError: the samples are not of the batch under way, or batches before it were not weighed.
        """
        if self.attachment is None:
            return self.judge(losses, timesteps, sample_ids, weights, wait=wait)
        return self.attachment.driver.weigh(losses, timesteps, sample_ids, weights)

    def prepare(
        self,
        accelerator: Any,
        denoiser: Any,
        optimizer: Any,
        dataloader: Any,
        lr_scheduler: Any = None,
        *,
        total_steps: int | None = None,
        models: Sequence[Any] = (),
        ema: Any = None,
        augment: Callable[[list[int], int], Any] | None = None,
        store_dir: str | Path | None = None,
        loss_weight: Callable[[Tensor], Tensor] | None = None,
        timestep_argument: str | None = None,
    ) -> tuple[Any, ...]:
        """Prepare a loop's objects in place of ``accelerator.prepare``, and train them under the guard.

        With several shards the batches go shard by shard; proxies, rounds, averages and checkpoints
        (``accelerator.save_state``) take care of themselves. See ``attach`` for the arguments.

        Returns:
            The denoiser (not wrapped by the guard), optimizer, dataloader and learning-rate schedule; with ``models``
            these stand after the denoiser. ``lr_scheduler`` is None where none was given.

        Raises:
            LoopError: something in the loop is not what the guard relies on; nothing was trained.
        """
        self._refuse_second_loop()
        options = LoopOptions(
            total_steps=total_steps,
            gradient_accumulation_steps=int(getattr(accelerator, "gradient_accumulation_steps", 1)),
            models=models,
            ema=ema,
            augment=augment,
            store_dir=store_dir,
            loss_weight=loss_weight,
            timestep_argument=timestep_argument,
        )
        loop = Loop(denoiser, optimizer, dataloader, lr_scheduler, AccelerateBackend(accelerator), options)
        objects = [denoiser, *models, optimizer, dataloader, *([] if lr_scheduler is None else [lr_scheduler])]
        self.attachment, prepared = prepare(self, accelerator, loop, objects)
        self._log_notices()
        return tuple(prepared if lr_scheduler is not None else [*prepared, None])

    def attach(
        self,
        denoiser: Any,
        optimizer: Any,
        dataloader: Any = None,
        lr_scheduler: Any = None,
        *,
        total_steps: int | None = None,
        gradient_accumulation_steps: int = 1,
        grad_scaler: Any = None,
        models: Sequence[Any] = (),
        ema: Any = None,
        augment: Callable[[list[int], int], Any] | None = None,
        store_dir: str | Path | None = None,
        loss_weight: Callable[[Tensor], Tensor] | None = None,
        timestep_argument: str | None = None,
    ) -> Any:
        """Train a plain torch loop under the guard, and return the dataloader to iterate over.

        Without a dataloader, one line guards a loop that stays as it is: samples whose loss is abnormally low for their
        timestep are skipped, by the gradient at the denoiser's output (docs/gate.md). A checkpoint of the loop's own
        keeps ``state_dict()`` of the guard. With a dataloader there are the counts of each sample besides; several
        shards, their proxies and rounds need ``total_steps``, too.

        Args:
            denoiser: the model whose weights, or an adapter in it, the optimizer trains: any module that is called with
                a timestep.
            optimizer: the loop's optimizer; its steps are watched by hooks, and it stays as it is.
            dataloader: a ``DataLoader`` over ``num_samples`` samples.
            lr_scheduler: stepped once after each optimizer step. A proxy at its step j gets the learning rate that
                the plain run has at step ``num_shards * j``. Without one the learning rate is left to the loop.
            total_steps: optimizer steps of the whole run, over all proxies; needed with several shards, since the last
                round ends with the run. It also tells ``num_shards="auto"`` how long the run is.
            gradient_accumulation_steps: batches per optimizer step.
            grad_scaler: the loop's ``GradScaler``; by default the only one of the process that is enabled.
            models: further models that the same optimizer trains, e.g. text encoders; needed with several shards.
            ema: the EMA of the trained weights (diffusers' ``EMAModel``), to be kept per proxy and averaged.
            augment: returns a batch like the dataloader's, of augmented copies of the samples with these ids, at a
                magnitude of RandAugment (of 30). Without it RandAugment goes into the dataset's own transform; where
                there is none, nothing is augmented, with a notice.
            store_dir: directory for offloaded proxies (default: RAM).
            loss_weight: returns what the loss multiplies a sample's error by, (n,), for the timesteps as the denoiser
                gets them, (n,): for weights that change much within 20 timesteps.
            timestep_argument: name of the denoiser's argument that is the timestep, where it is none of the usual ones.

        Raises:
            LoopError: something in the loop is not what the guard relies on; nothing was trained.
        """
        self._refuse_second_loop()
        options = LoopOptions(
            total_steps=total_steps,
            gradient_accumulation_steps=gradient_accumulation_steps,
            models=models,
            ema=ema,
            augment=augment,
            store_dir=store_dir,
            loss_weight=loss_weight,
            timestep_argument=timestep_argument,
        )
        backend = PlainBackend(grad_scaler)
        self.attachment = attach(self, Loop(denoiser, optimizer, dataloader, lr_scheduler, backend, options))
        self._log_notices()
        return self.attachment.loader

    def averaged(self, denoiser: Any, *, rank: int | None = None) -> AbstractContextManager[None]:
        """Return a context in which the denoiser holds what to generate with or save: the mean of the proxies.

        With an EMA it is the mean of the EMA. With LoRA the whole change is in the adapter, of a rank that is the
        adapter's times the number of shards, or ``rank``; the base is as it was before training.

        Args:
            denoiser: the model in training.
            rank: rank of the adapter in the context.

        Raises:
            LoopError: the guard is in no loop, in one of another model, or has seen no losses, or some proxies were
                never trained.
        """
        if self.attachment is None:
            raise LoopError(
                "the guard is in no loop, so that there are no proxies to average; call `prepare` or `attach`"
            )
        if unwrap(denoiser) is not unwrap(self.attachment.unet):
            raise LoopError("`denoiser` is not the model that the guard was given; give `averaged` that one")
        return self.attachment.averaged(rank)

    def validate(self) -> list[str]:
        """Return what a user should know before training starts; empty when all is as configured.

        Raises:
            LoopError: the guard cannot work: it has several shards, and nobody makes their proxies take turns.
        """
        if self.attachment is None:
            if self.num_shards > 1:
                raise LoopError(
                    f"the guard has {self.num_shards} shards but is in no loop, and nobody trains a proxy for each; "
                    "call `prepare` or `attach`, or set `num_shards=1`"
                )
            return []
        return list(self.attachment.notices)

    def _refuse_second_loop(self) -> None:
        if self.attachment is not None:
            raise LoopError("the guard is in a loop already; make one guard for each loop")

    def _log_notices(self) -> None:
        for notice in self.validate():
            logger.warning("%s", notice)
