"""MemorizationGuard: the one object a training loop talks to."""

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sd_memguard.config import GuardConfig
from sd_memguard.core.async_copy import AsyncCPUCopy
from sd_memguard.core.augmentation import AugmentQueue, augment_magnitude, augment_strength
from sd_memguard.core.bands import Bands, classify
from sd_memguard.core.decision import Counted, Verdict
from sd_memguard.core.ledger import SampleLedger
from sd_memguard.core.memory_bank import LossMemoryBank
from sd_memguard.core.redistribution import redistribute
from sd_memguard.core.shards import Moves, ShardPlan, auto_num_shards, count_images, split_into_shards
from sd_memguard.errors import LoopError

if TYPE_CHECKING:
    from sd_memguard.plugin.attach import Attachment

logger = logging.getLogger(__name__)

STATE_KIND = "MemorizationGuard-1"


class AugmentBatch(NamedTuple):
    """Samples to train from augmented copies in one extra step, and the magnitude of their RandAugment (of 30)."""

    sample_ids: list[int]
    magnitude: int


class MemorizationGuard:
    """IET-AGC+ as an object: shards, one memory bank and augmentation queue per proxy, and the ledger of samples.

    A training step goes through it as follows:

    1. The loop computes one loss per sample and calls ``weigh``.
    2. Each loss is compared with the active proxy's memory bank at its timestep: skip, augment or clean.
    3. All samples update the bank and the ledger; those to augment join the proxy's queue.
    4. The loop backwards ``verdict.loss`` and steps, unless ``verdict.num_clean`` is 0.
    5. When a batch's worth waits in the queue, ``take_augment_batch`` hands it out for an extra step.

    At a round's end the loop either averages the proxies by ``aggregation_weights`` or calls ``redistribute``.
    In a loop of somebody else's ``prepare`` (accelerate) or ``attach`` sees to all of this but ``weigh``.

    Args:
        config: the guard's settings.
        num_samples: number of samples, ids ``0 .. num_samples-1``.
        num_timesteps: number of timesteps of the noise schedule.
        groups: (num_samples,) int64, duplicates share a number and stay together. With ``group_duplicates="balance"``
            a group counts as one image: in the sizes of the shards, in what moves, and in the weights of the proxies;
            the loop is to visit one member of each group in a pass. Without groups there are no duplicates, with a
            notice.
        exclude: sample ids that are not trained on, e.g. unreadable images.
        augments: whether the loop trains augmented copies; if not there are two bands.
        device: where the memory banks live.

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
        num_samples: int,
        *,
        num_timesteps: int = 1000,
        groups: Tensor | None = None,
        exclude: Tensor | None = None,
        augments: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.seed = secrets.randbits(31) if config.seed is None else config.seed
        self.groups = self._check_groups(groups, num_samples)
        num_shards = config.num_shards
        if num_shards == "auto":
            num_shards = auto_num_shards(count_images(num_samples, groups, exclude))
        balanced = config.group_duplicates == "balance"
        self.plan = split_into_shards(num_samples, num_shards, self.seed, groups, exclude, balanced=balanced)
        if groups is None and (balanced or (config.group_duplicates == "shard" and num_shards > 1)):
            logger.warning(
                "`group_duplicates` is %r, but the guard was given no `groups`: it takes no sample for a duplicate of "
                "another. Give `groups`, or set it to 'off'",
                config.group_duplicates,
            )
        self.ledger = SampleLedger(num_samples)
        self.banks = [
            LossMemoryBank(num_timesteps, config.bank_decay, config.bank_mode, device) for _ in range(num_shards)
        ]
        self.queues = [AugmentQueue() for _ in range(num_shards)]
        self.augment_threshold = config.augment_threshold if augments else 0.0
        self.shard_index = 0
        self.attachment: Attachment | None = None

    @property
    def num_shards(self) -> int:
        """Number of shards, with ``"auto"`` resolved."""
        return self.plan.num_shards

    def _check_groups(self, groups: Tensor | None, num_samples: int) -> Tensor | None:
        if groups is None:
            return None
        if self.config.group_duplicates == "off":
            raise ValueError("`groups` were given, but `group_duplicates` is 'off'; set it to 'shard' or 'balance'")
        if groups.shape != (num_samples,):
            raise ValueError(
                f"`groups` must be of shape ({num_samples},), a number for each sample, got {tuple(groups.shape)}"
            )
        return groups

    @property
    def balanced_groups(self) -> Tensor | None:
        """The groups of which each pass visits one member, None where every sample is visited."""
        return self.groups if self.config.group_duplicates == "balance" else None

    def num_images(self) -> list[int]:
        """Return the length of a pass over each shard: its samples, or its groups of duplicates under ``balance``."""
        return self.plan.sizes(self.balanced_groups)

    @property
    def redistributes(self) -> bool:
        """Whether rounds alternate between redistribution and averaging."""
        return self.config.redistribute_fraction > 0 and self.num_shards > 1

    @property
    def augments(self) -> bool:
        """Whether samples are trained from augmented copies."""
        return 0 < self.config.skip_threshold < self.augment_threshold

    @property
    def is_neutral(self) -> bool:
        """Whether all four parts are off, so that training is what it is without a guard."""
        return self.num_shards == 1 and self.config.skip_threshold == 0

    def weigh(
        self,
        losses: Tensor,
        timesteps: Tensor,
        sample_ids: Tensor,
        weights: Tensor | None = None,
        *,
        wait: bool = True,
    ) -> Verdict:
        """Judge a batch of the active shard and return what to backward.

        Args:
            losses: (B,) float with graph, the mean over C, H, W of each sample's squared error, before any weight.
            timesteps: (B,) int64.
            sample_ids: (B,) int64.
            weights: (B,) float, loss weights such as min-SNR; they scale the loss, not the decision.
            wait: whether to wait until the device has computed the losses. A loop that does not, and backwards
                ``clean_sum`` over a number of its own, keeps the device busy; it must read ``num_clean`` of each
                verdict, in their order, before it goes on to the next step.

        Raises:
            ValueError: the shapes differ, or a sample is not of this dataset.
        """
        if not losses.shape == timesteps.shape == sample_ids.shape or losses.dim() != 1:
            raise ValueError(
                "`losses`, `timesteps` and `sample_ids` must all be of shape (batch,), got "
                f"{tuple(losses.shape)}, {tuple(timesteps.shape)} and {tuple(sample_ids.shape)}; "
                "reduce the loss over all dimensions but the first"
            )
        if weights is not None and weights.shape != losses.shape:
            raise ValueError(
                f"`weights` must be of the shape of `losses`, {tuple(losses.shape)}, got {tuple(weights.shape)}; "
                "give one weight for each sample"
            )
        host_ids = sample_ids.cpu()
        num_samples = len(self.plan.assignment)
        if len(host_ids) and not 0 <= int(host_ids.min()) <= int(host_ids.max()) < num_samples:
            raise ValueError(
                f"`sample_ids` must be between 0 and {num_samples - 1}, got {host_ids.tolist()}; "
                "give each sample its row number in the dataset"
            )
        rounds = None if self.attachment is None else self.attachment.rounds
        if rounds is not None:
            rounds.check_batch(host_ids)
        if rounds is not None and rounds.augmented:  # copies say nothing of how well a sample itself is known
            loss_ratio = torch.full_like(losses.detach(), torch.inf, dtype=torch.float32)
            bands = classify(loss_ratio, 0.0, 0.0)
        else:
            bank = self.banks[self.shard_index]
            loss_ratio = bank.loss_ratio(timesteps, losses)
            bands = classify(loss_ratio, self.config.skip_threshold, self.augment_threshold)
            bank.update(timesteps, losses)
        weighted = losses if weights is None else losses * weights
        clean_sum = torch.where(bands.clean_mask, weighted, 0.0).sum()
        # One transfer to the host for everything that is counted there.
        on_its_way = AsyncCPUCopy(
            torch.stack((losses.detach().float(), loss_ratio, bands.skip_mask, bands.augment_mask))
        )
        counts, shard_index = rounds is None or not rounds.augmented, self.shard_index

        def count() -> Counted:
            judged, ratio, skip, augment = on_its_way.wait()
            host = Counted(judged, ratio, Bands(skip.bool(), augment.bool(), ~(skip + augment).bool()))
            if counts:
                self._count(host_ids, host, shard_index)
            return host

        divisor = None if rounds is None else rounds.divisor
        verdict = Verdict(clean_sum, loss_ratio, bands.skip_mask, bands.augment_mask, count, divisor)
        if wait or rounds is not None:
            _ = verdict.divisor
        if rounds is not None:
            rounds.weighed(verdict)
        return verdict

    def _count(self, sample_ids: Tensor, batch: Counted, shard_index: int) -> None:
        self.ledger.record(sample_ids, batch.bands)
        waiting = batch.bands.augment_mask
        if waiting.any():
            strengths = augment_strength(batch.loss_ratio[waiting], self.config.skip_threshold)
            self.queues[shard_index].push(sample_ids[waiting], strengths)

    def take_augment_batch(self, batch_size: int) -> AugmentBatch | None:
        """Return a batch of samples of the active proxy to train from augmented copies, None while too few wait."""
        queue = self.queues[self.shard_index]
        if len(queue) < batch_size:
            return None
        sample_ids, strengths = queue.pop(batch_size, keep_surplus=self.config.augment_surplus == "keep")
        return AugmentBatch(sample_ids, augment_magnitude(strengths))

    def aggregation_weights(self) -> list[float]:
        """Return the weight of each proxy in the aggregate: the shard's number of images, or 1 (paper)."""
        return [float(size) if self.config.shard_weights == "size" else 1.0 for size in self.num_images()]

    def redistribute(self) -> Moves:
        """Move the memory-prone samples of each shard to the next one and count skips again."""
        fraction = self.config.redistribute_fraction
        balanced = self.config.group_duplicates == "balance"
        self.plan, moves = redistribute(self.plan, self.ledger.skips, fraction, self.groups, balanced=balanced)
        self.ledger.record_moves(moves.sample_ids)
        return moves

    # In a loop that somebody else has written.

    def prepare(
        self,
        accelerator: Any,
        unet: Any,
        optimizer: Any,
        dataloader: Any,
        lr_scheduler: Any = None,
        *,
        total_steps: int | None = None,
        models: Sequence[Any] = (),
        ema: Any = None,
        augment: Callable[[list[int], int], Any] | None = None,
        store_dir: str | Path | None = None,
    ) -> tuple[Any, ...]:
        """Prepare a loop's objects in place of ``accelerator.prepare``, and train them under the guard.

        The dataloader's batches come with ``sample_id`` and go shard by shard; proxies, rounds, averages and
        checkpoints (``accelerator.save_state``) take care of themselves. See ``attach`` for the arguments.

        Returns:
            The UNet (not wrapped by the guard), optimizer, dataloader and learning-rate schedule; with ``models`` these
            stand after the UNet. ``lr_scheduler`` is None where none was given.

        Raises:
            LoopError: something in the loop is not what the guard relies on; nothing was trained.
        """
        from sd_memguard.plugin.attach import LoopOptions, prepare

        self._refuse_second_loop()
        options = LoopOptions(total_steps=total_steps, models=models, ema=ema, augment=augment, store_dir=store_dir)
        self.attachment, prepared = prepare(self, accelerator, unet, optimizer, dataloader, lr_scheduler, options)
        self._tell()
        return tuple(prepared)

    def attach(
        self,
        unet: Any,
        optimizer: Any,
        dataloader: Any,
        lr_scheduler: Any = None,
        *,
        total_steps: int | None = None,
        models: Sequence[Any] = (),
        ema: Any = None,
        augment: Callable[[list[int], int], Any] | None = None,
        store_dir: str | Path | None = None,
    ) -> Any:
        """Train a plain torch loop under the guard, and return the dataloader to iterate over.

        Args:
            unet: the model whose weights, or whose peft LoRA adapter, the optimizer trains.
            optimizer: the loop's optimizer; its steps are watched by hooks, and it stays as it is.
            dataloader: a ``DataLoader`` over ``num_samples`` samples whose batches are dicts.
            lr_scheduler: stepped once after each optimizer step. A proxy at its step j gets the learning rate that
                the plain run has at step ``num_shards * j``. Without one the learning rate is left to the loop.
            total_steps: optimizer steps of the whole run, over all proxies; needed with several shards, since the last
                round ends with the run.
            models: further models that the same optimizer trains, e.g. text encoders.
            ema: the EMA of the trained weights (diffusers' ``EMAModel``), to be kept per proxy and averaged.
            augment: returns a batch like the dataloader's, of augmented copies of the samples with these ids, at a
                magnitude of RandAugment (of 30). Without it RandAugment goes into the dataset's own transform; where
                there is none, nothing is augmented, with a notice.
            store_dir: folder where resting proxies wait, in place of memory; what it holds is removed.

        Raises:
            LoopError: something in the loop is not what the guard relies on; nothing was trained.
        """
        from sd_memguard.plugin.attach import LoopOptions, attach

        self._refuse_second_loop()
        options = LoopOptions(total_steps=total_steps, models=models, ema=ema, augment=augment, store_dir=store_dir)
        self.attachment = attach(self, unet, optimizer, dataloader, lr_scheduler, options)
        self._tell()
        return self.attachment.loader

    def averaged(self, unet: Any, *, rank: int | None = None) -> AbstractContextManager[None]:
        """Return a context in which the UNet holds what should be drawn with or saved: the mean of the proxies.

        With an EMA it is the mean of the EMA. With LoRA the whole change is in the adapter, of a rank that is the
        adapter's times the number of shards, or ``rank``; the base is as it was before training.

        Args:
            unet: the UNet in training.
            rank: rank of the adapter in the context.

        Raises:
            LoopError: the guard is in no loop, in one of another UNet, or has seen no losses.
        """
        if self.attachment is None:
            raise LoopError(
                "the guard is in no loop, so that there are no proxies to average; call `prepare` or `attach`"
            )
        if getattr(unet, "module", unet) is not self.attachment.unet:
            raise LoopError("`unet` is not the one that the guard was given; give `averaged` that one")
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

    def _tell(self) -> None:
        for notice in self.validate():
            logger.warning("%s", notice)

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes during a run, as nested dicts and lists of tensors and JSON values."""
        return {
            "kind": STATE_KIND,
            "seed": self.seed,
            "num_shards": self.num_shards,
            "shard_index": self.shard_index,
            "assignment": self.plan.assignment,
            "groups": self.groups,
            "ledger": self.ledger.state_dict(),
            "banks": [bank.state_dict() for bank in self.banks],
            "queues": [{"sample_ids": queue.sample_ids, "strengths": queue.strengths} for queue in self.queues],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: it is of another format, number of shards or samples, or bank; nothing is changed then.
        """
        expected = (STATE_KIND, self.num_shards, tuple(self.plan.assignment.shape))
        found = (state["kind"], state["num_shards"], tuple(state["assignment"].shape))
        if expected != found:
            raise ValueError(f"the guard expects (kind, shards, samples) = {expected}, the saved state has {found}")
        for bank, saved in zip(self.banks, state["banks"], strict=True):
            bank.check_state(saved)
        self.ledger.load_state_dict(state["ledger"])
        self.seed, self.shard_index, self.groups = state["seed"], state["shard_index"], state["groups"]
        self.plan = ShardPlan(state["assignment"].clone(), self.num_shards)
        for bank, saved in zip(self.banks, state["banks"], strict=True):
            bank.load_state_dict(saved)
        self.queues = [AugmentQueue(list(q["sample_ids"]), list(q["strengths"])) for q in state["queues"]]
