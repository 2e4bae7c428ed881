"""What ``auto`` comes to: one function for the trainer, the launcher and loops of one's own."""

from collections.abc import Callable
from dataclasses import replace

from sd_memguard.config import GuardConfig
from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.core.shards import auto_num_shards

MIN_ANCHORS = 8
"""Images of a shard that must be held back for the rule ``anchored``: fewer say too little of what is normal."""


def resolve_num_shards(config: GuardConfig, num_images: int, num_epochs: float | None) -> int:
    """Return the number of shards, with ``auto`` resolved; see ``resolve_settings``."""
    return auto_num_shards(num_images, num_epochs) if config.num_shards == "auto" else config.num_shards


def resolve_sample_rule(config: GuardConfig, num_images: int | None, num_shards: int) -> str:
    """Return the sample rule's name, with ``auto`` resolved: ``anchored`` where each shard has enough to hold back.

    Args:
        config: as given by the user.
        num_images: distinct images, near-duplicates counted once; None where samples have no ids.
        num_shards: number of shards.
    """
    if config.sample_rule != "auto":
        return config.sample_rule
    num_anchors = 0 if num_images is None else num_images // num_shards * config.anchor_fraction
    skips_alone = config.skip_threshold > 0 and not config.augments
    return "anchored" if skips_alone and num_anchors >= MIN_ANCHORS else "agc"


def resolve_settings(
    config: GuardConfig, *, num_images: int, num_epochs: float | None, total_steps: Callable[[int], int]
) -> tuple[GuardConfig, RoundSchedule]:
    """Return the settings without any ``auto`` in them, and the rounds they lead to.

    Args:
        config: as given by the user.
        num_images: distinct images, near-duplicates counted once.
        num_epochs: how often one model would see each of them in the whole run; None where nobody knows.
        total_steps: returns the optimizer steps of the run, over all proxies, for a number of shards.
    """
    num_shards = resolve_num_shards(config, num_images, num_epochs)
    schedule = RoundSchedule.plan(
        total_steps(num_shards), num_shards, config.steps_per_round, config.redistribute_fraction > 0
    )
    resolved = replace(
        config,
        num_shards=num_shards,
        steps_per_round=schedule.steps_per_round,
        sample_rule=resolve_sample_rule(config, num_images, num_shards),
    )
    return resolved, schedule
