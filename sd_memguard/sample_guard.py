"""SampleGuard: who is in which shard, what is normal for a sample, and what becomes of its gradient."""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd_memguard.config import GuardConfig
from sd_memguard.core.augmentation import AugmentQueue, augment_magnitude, augment_strength
from sd_memguard.core.decision import DecisionCopy, Verdict
from sd_memguard.core.ledger import SampleLedger
from sd_memguard.core.redistribution import redistribute
from sd_memguard.core.rules import AUGMENT, Action, Decision, SampleRule, make_rule
from sd_memguard.core.shards import Moves, ShardPlan, count_images, lowest_of_group, split_into_shards
from sd_memguard.core.timesteps import TimestepBins
from sd_memguard.defaults import resolve_num_shards, resolve_sample_rule

logger = logging.getLogger(__name__)

STATE_KIND = "SampleGuard-1"


class AugmentBatch(NamedTuple):
    """Samples to train from augmented copies in one extra step, and the magnitude of their RandAugment (of 30)."""

    sample_ids: list[int]
    magnitude: int


class Judged(NamedTuple):
    """A decided batch that is not counted yet: sample ids (B,) on the CPU, the decision on its way, and the shard."""

    sample_ids: Tensor
    copy: DecisionCopy
    shard_index: int


class SampleGuard:
    """IET-AGC+ for one batch at a time: shards, a sample rule and an augmentation queue per proxy, and the ledger.

    A training step goes through it as follows:

    1. The loop computes one loss per sample and calls ``weigh``.
    2. The sample rule of the active proxy decides on each sample: a clean update, a weight, skip, or augment.
    3. All samples update the rule and the ledger; those to augment join the proxy's queue.
    4. The loop backwards ``verdict.loss`` and steps, unless ``verdict.num_clean`` is 0.
    5. When a batch's worth waits in the queue, ``take_augment_batch`` hands it out for an extra step.

    At a round's end the loop either averages the proxies by ``aggregation_weights`` or calls ``redistribute``.

    Args:
        config: the guard's settings.
        num_samples: number of samples, ids ``0 .. num_samples-1``; None where the loop has no ids: then there is one
            shard, and no ledger to speak of.
        num_timesteps: number of timesteps of the noise schedule.
        groups: (num_samples,) int64, near-duplicates share a number and stay together. With
            ``group_duplicates="balance"`` a group counts as one image: in the sizes of the shards, in what moves, and
            in the weights of the proxies; an epoch shows one member of each group. See ``sd_memguard.find_duplicates``.
        exclude: sample ids that are not trained on, e.g. unreadable images.
        augments: whether the loop trains augmented copies; if not, what the rule would augment is trained as it is.
        num_epochs: how often one model would see each distinct image, for ``num_shards="auto"``; None: unknown.
        device: where the rules' state lives.

    Raises:
        ValueError: more shards than usable samples or groups, or groups while ``group_duplicates`` is off.
        ConfigError: no sample rule has the configured name.
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
        num_epochs: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.num_timesteps, self.device = num_timesteps, torch.device(device)
        self.bins = TimestepBins(num_timesteps)
        self.seed = secrets.randbits(31) if config.seed is None else config.seed
        self.has_ids = num_samples is not None
        self.groups = self._check_groups(groups, num_samples or 0)
        self._exclude = exclude
        self.augments_allowed = augments
        self.shard_index = 0
        self._image_ids: Tensor | None = None
        self._uncounted: list[Judged] = []
        self.ledger: SampleLedger
        self.split(num_samples or 0, num_epochs)

    def keep_one_shard(self) -> None:
        """Train one model, where ``num_shards="auto"`` would be more than the loop allows."""
        self.config = replace(self.config, num_shards=1)
        self.split(len(self.plan.assignment), None)

    def split(self, num_samples: int, num_epochs: float | None) -> None:
        """Split the samples in shards and begin with empty rules, queues and ledger.

        Args:
            num_samples: number of samples.
            num_epochs: how often one model would see each distinct image, for ``num_shards="auto"``; None: unknown.
        """
        config = self.config
        if self.has_ids:
            num_images = count_images(num_samples, self.groups, self._exclude)
            num_shards = resolve_num_shards(config, num_images, num_epochs)
            self.plan = split_into_shards(
                num_samples, num_shards, self.seed, self.groups, self._exclude, balanced=self._balances
            )
            self._image_ids = lowest_of_group(self.groups)
        else:
            num_images = None
            self.plan = ShardPlan(torch.empty(0, dtype=torch.int16), 1)
        self.sample_rule = resolve_sample_rule(config, num_images, self.num_shards)
        self._restart()

    def _restart(self) -> None:
        """Begin with an empty rule and queue for each shard, and an empty ledger."""
        settings = replace(self.config, sample_rule=self.sample_rule)
        if not self.augments_allowed:
            settings = replace(settings, augment_threshold=0.0)
        self.rules: list[SampleRule] = [
            make_rule(settings, num_timesteps=self.num_timesteps, device=self.device) for _ in range(self.num_shards)
        ]
        self.queues = [AugmentQueue() for _ in range(self.num_shards)]
        self.ledger = SampleLedger(len(self.plan.assignment), self.actions)

    @property
    def num_shards(self) -> int:
        """Number of shards, with ``"auto"`` resolved."""
        return self.plan.num_shards

    @property
    def actions(self) -> tuple[Action, ...]:
        """What the sample rule may do besides a clean update."""
        return self.rules[0].actions

    @property
    def _balances(self) -> bool:
        return self.config.group_duplicates == "balance"

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
        """The groups of which each epoch shows one member, None where every sample is shown."""
        return self.groups if self._balances else None

    def epoch_lengths(self) -> list[int]:
        """Return the length of an epoch of each shard: its samples, or its groups of duplicates under ``balance``."""
        return self.plan.sizes(self.balanced_groups)

    @property
    def redistributes(self) -> bool:
        """Whether rounds alternate between redistribution and averaging."""
        return self.config.redistribute_fraction > 0 and self.num_shards > 1

    @property
    def augments(self) -> bool:
        """Whether samples are trained from augmented copies."""
        return self.augments_allowed and self.config.augments

    def disable_augmentation(self) -> None:
        """Train what the rule would augment as it is, since nobody can make augmented copies."""
        self.augments_allowed = False
        self._restart()

    @property
    def is_neutral(self) -> bool:
        """Whether all four parts are off, so that training is what it is without a guard."""
        return self.num_shards == 1 and self.config.is_neutral_rule

    # A batch.

    def judge(
        self,
        losses: Tensor,
        timesteps: Tensor,
        sample_ids: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        wait: bool = True,
    ) -> Verdict:
        """Judge a batch of the active shard and return what to backward; the rules follow the losses' device.

        Args:
            losses: (B,) float with graph, the mean over C, H, W of each sample's squared error, before any weight.
            timesteps: (B,) as the model is given them: integers, or floats (sigmas, timesteps of flow matching) that
                are put in ``num_timesteps`` bins, see ``core.timesteps``.
            sample_ids: (B,) int64; None where the guard was made without ``num_samples``.
            weights: (B,) float, loss weights such as min-SNR; they scale the loss, not the decision.
            wait: whether to wait until the device has computed the losses, and count them. Without, the device is kept
                busy, and the batch is counted by ``count``, or before the guard needs its counts.

        Raises:
            ValueError: the shapes differ, or a sample is not of this dataset.
        """
        host_ids = self._check_batch(losses, timesteps, sample_ids, weights)
        if losses.device != self.device:
            self.to(losses.device)
        bins, rule = self.bins(timesteps), self.rules[self.shard_index]
        image_ids = host_ids if host_ids is None or self._image_ids is None else self._image_ids[host_ids]
        decision = rule.decide(losses.detach(), bins, image_ids)
        rule.update(losses.detach(), bins, image_ids)
        verdict = self._verdict(losses, decision, weights)
        if host_ids is not None:
            self._uncounted.append(Judged(host_ids, verdict._copy, self.shard_index))
        if wait:
            self.count()
        return verdict

    def weigh(
        self,
        losses: Tensor,
        timesteps: Tensor,
        sample_ids: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        wait: bool = True,
    ) -> Verdict:
        """Judge a batch; the verb of a loop with its losses at hand, see ``judge``."""
        return self.judge(losses, timesteps, sample_ids, weights, wait=wait)

    def to(self, device: torch.device | str) -> None:
        """Move the rules to a device."""
        self.device = torch.device(device)
        for rule in self.rules:
            rule.to(self.device)

    def pass_through(self, losses: Tensor, weights: Tensor | None = None) -> Verdict:
        """Return the verdict that trains a batch as it is, and count nothing: for augmented copies."""
        return self._verdict(losses, Decision.clean(losses), weights)

    def count(self) -> None:
        """Enter the batches judged since the last call in the ledger and the queues, waiting for the device."""
        batches, self._uncounted = self._uncounted, []
        for sample_ids, copy, shard_index in batches:
            host = copy.host
            self.ledger.record(sample_ids, host.actions)
            if AUGMENT in self.actions:
                waiting = host.actions == self.actions.index(AUGMENT) + 1
                if waiting.any():
                    strengths = augment_strength(host.loss_ratio[waiting], self.config.skip_threshold)
                    self.queues[shard_index].push(sample_ids[waiting], strengths)

    def _verdict(self, losses: Tensor, decision: Decision, weights: Tensor | None) -> Verdict:
        weighted = losses if weights is None else losses * weights
        trained = decision.weights > 0
        # Masked, not multiplied alone: a skipped loss that is not finite must not reach the sum.
        loss_sum = torch.where(trained, weighted * decision.weights, 0.0).sum()
        loss = loss_sum / trained.sum().clamp(min=1)
        copy = DecisionCopy(losses, decision)
        return Verdict(loss, loss_sum, decision.loss_ratio, decision.weights, decision.actions, self.actions, copy)

    def _check_batch(
        self, losses: Tensor, timesteps: Tensor, sample_ids: Tensor | None, weights: Tensor | None
    ) -> Tensor | None:
        """Return the sample ids on the CPU."""
        if losses.dim() != 1 or losses.shape != timesteps.shape:
            raise ValueError(
                "`losses` and `timesteps` must be of shape (batch,), got "
                f"{tuple(losses.shape)} and {tuple(timesteps.shape)}; "
                "reduce the loss over all dimensions but the first"
            )
        if weights is not None and weights.shape != losses.shape:
            raise ValueError(
                f"`weights` must be of the shape of `losses`, {tuple(losses.shape)}, got {tuple(weights.shape)}; "
                "give one weight for each sample"
            )
        if not self.has_ids:
            return None
        num_samples = len(self.plan.assignment)
        if sample_ids is None or sample_ids.shape != losses.shape:
            got = "none" if sample_ids is None else tuple(sample_ids.shape)
            raise ValueError(
                f"`sample_ids` must be of shape {tuple(losses.shape)}, as `losses`, got {got}; give each sample its "
                "row number in the dataset; reduce the loss over all dimensions but the first"
            )
        host_ids = sample_ids.cpu()
        if len(host_ids) and not 0 <= int(host_ids.min()) <= int(host_ids.max()) < num_samples:
            raise ValueError(
                f"`sample_ids` must be between 0 and {num_samples - 1}, got {host_ids.tolist()}; "
                "give each sample its row number in the dataset"
            )
        return host_ids

    def take_augment_batch(self, batch_size: int) -> AugmentBatch | None:
        """Return a batch of samples of the active proxy to train from augmented copies, None while too few wait."""
        self.count()
        queue = self.queues[self.shard_index]
        if len(queue) < batch_size:
            return None
        sample_ids, strengths = queue.pop(batch_size, keep_surplus=self.config.augment_surplus == "keep")
        return AugmentBatch(sample_ids, augment_magnitude(strengths))

    # The end of a round.

    def aggregation_weights(self) -> list[float]:
        """Return the weight of each proxy in the aggregate: the shard's number of images, or 1 (paper)."""
        return [float(size) if self.config.shard_weights == "size" else 1.0 for size in self.epoch_lengths()]

    def redistribute(self) -> Moves:
        """Move the memory-prone samples of each shard to the next one and reset the counts of skips."""
        self.count()
        fraction = self.config.redistribute_fraction
        self.plan, moves = redistribute(self.plan, self.ledger.skips, fraction, self.groups, balanced=self._balances)
        self.ledger.record_moves(moves.sample_ids)
        return moves

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes during a run, as nested dicts and lists of tensors and JSON values."""
        self.count()
        return {
            "kind": STATE_KIND,
            "seed": self.seed,
            "num_shards": self.num_shards,
            "shard_index": self.shard_index,
            "assignment": self.plan.assignment,
            "groups": self.groups,
            "ledger": self.ledger.state_dict(),
            "bins": self.bins.state_dict(),
            "rules": [rule.state_dict() for rule in self.rules],
            "queues": [{"sample_ids": queue.sample_ids, "strengths": queue.strengths} for queue in self.queues],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: it is of another format, number of shards or samples, or sample rule; nothing is changed then.
        """
        expected = (STATE_KIND, self.num_shards, tuple(self.plan.assignment.shape))
        found = (state["kind"], state["num_shards"], tuple(state["assignment"].shape))
        if expected != found:
            raise ValueError(f"the guard expects (kind, shards, samples) = {expected}, the saved state has {found}")
        for rule, saved in zip(self.rules, state["rules"], strict=True):
            rule.check_state(saved)
        self.ledger.load_state_dict(state["ledger"])
        self._uncounted = []
        self.seed, self.shard_index, self.groups = state["seed"], state["shard_index"], state["groups"]
        self.plan = ShardPlan(state["assignment"].clone(), self.num_shards)
        self.bins.load_state_dict(state["bins"])
        for rule, saved in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(saved)
        self.queues = [AugmentQueue(list(q["sample_ids"]), list(q["strengths"])) for q in state["queues"]]
