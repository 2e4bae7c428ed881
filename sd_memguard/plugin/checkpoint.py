"""The guard's part of a checkpoint that the loop writes: a folder `memguard/` in it, of safetensors and JSON."""

import logging
import shutil
from pathlib import Path
from typing import Any

from sd_memguard.errors import LoopError
from sd_memguard.plugin.loop_driver import LoopDriver
from sd_memguard.proxies.state_file import load_state, save_state

logger = logging.getLogger(__name__)

FOLDER, PROXIES, STATE = "memguard", "proxies", "state"
KIND = "GuardedLoop-2"


def save(driver: LoopDriver, checkpoint: Path) -> None:
    """Write the guard's part of a checkpoint; it appears whole or not at all."""
    temporary = checkpoint / f"writing-{FOLDER}"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / PROXIES).mkdir(parents=True)
    schedule = driver.schedule
    state: dict[str, Any] = {
        "kind": KIND,
        "total_steps": schedule.total_steps,
        "steps_per_round": schedule.steps_per_round,
        **driver.state_dict(),
        "proxies": None,
    }
    if driver.schedule.num_shards > 1:  # a single proxy is the model and the optimizer that the loop saves itself
        state["proxies"] = driver.ensemble.save_proxies(temporary / PROXIES)
    save_state(state, temporary, STATE)
    shutil.rmtree(checkpoint / FOLDER, ignore_errors=True)
    temporary.rename(checkpoint / FOLDER)


def announce(driver: LoopDriver, checkpoint: Path) -> None:
    """Read the guard's part of a checkpoint and check it; it is taken up when the loop asks for its next batch.

    So the loop may restore its own parts in whatever order, and the proxies have the last word. A run may go on for
    longer than it was begun for, and not for fewer steps, as the drop-in script's may.

    Raises:
        LoopError: there is none, or it is of another guard, or of a longer run.
    """
    folder = checkpoint / FOLDER
    if not (folder / f"{STATE}.json").is_file():
        if driver.schedule.num_shards == 1:
            logger.warning("%s was written without the guard: its bank and counts start from zero", checkpoint)
            return
        raise LoopError(
            f"{checkpoint} was written without the guard (no {FOLDER}/ in it), so that shards, proxies and memory "
            "banks are missing; begin again, or go on without the guard"
        )
    state = load_state(folder, STATE)
    present = {"kind": KIND, "shards": driver.schedule.num_shards, "samples": len(driver.guard.plan.assignment)}
    saved = {
        "kind": state["kind"],
        "shards": state["ensemble"]["guard"]["num_shards"],
        "samples": len(state["ensemble"]["guard"]["assignment"]),
    }
    if saved != present:
        raise LoopError(f"{checkpoint} was written by another guard: {saved} there, {present} here; use the same")

    _check_length(driver, state, checkpoint)

    def restore() -> None:
        driver.set_steps_per_round(state["steps_per_round"])
        driver.load_state_dict(state)
        if state["proxies"] is not None:
            driver.ensemble.load_proxies(folder / PROXIES, state["proxies"])
        logger.info("the guard goes on from step %d of %s", driver.ensemble.progress.global_step, checkpoint)

    driver.restore = restore


def _check_length(driver: LoopDriver, state: dict[str, Any], checkpoint: Path) -> None:
    """Refuse other rounds than those that the run was begun with; of one shard they change nothing.

    Raises:
        LoopError: names the setting and both values.
    """
    if driver.schedule.num_shards == 1:
        return
    if driver.schedule.total_steps < state["total_steps"]:
        raise LoopError(
            f"{checkpoint} was made with other settings: `--max_train_steps` (`total_steps`) {state['total_steps']} "
            f"there, {driver.schedule.total_steps} here; give the same ones, or more, to go on, or begin again "
            "elsewhere"
        )
    wanted = driver.guard.config.steps_per_round
    if wanted not in ("auto", state["steps_per_round"]):
        raise LoopError(
            f"{checkpoint} was made with other settings: `--steps_per_round` {state['steps_per_round']} there, "
            f"{wanted} here; give the same ones to go on, or begin again elsewhere"
        )
