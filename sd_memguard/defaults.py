"""What ``auto`` comes to: one function for the trainer, the launcher and loops of one's own."""

from collections.abc import Callable
from dataclasses import replace

from sd_memguard.config import GuardConfig
from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.core.shards import auto_num_shards


def resolve_num_shards(config: GuardConfig, num_images: int, num_epochs: float | None) -> int:
    """Return the number of shards, with ``auto`` resolved; see ``resolve_settings``."""
    return auto_num_shards(num_images, num_epochs) if config.num_shards == "auto" else config.num_shards


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
    return replace(config, num_shards=num_shards, steps_per_round=schedule.steps_per_round), schedule
