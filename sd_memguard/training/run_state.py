"""What a run saves and restores: proxies, guard, progress and rounds, in checkpoints that hold the aggregate too."""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from sd_memguard.ensemble import Ensemble
from sd_memguard.files import replace_file
from sd_memguard.models.lora import merge, merge_adapter
from sd_memguard.models.pipeline import load_unet
from sd_memguard.proxies.lora import LoraProxies
from sd_memguard.proxies.scalers import ProxyScalers
from sd_memguard.proxies.state_file import load_state, save_state
from sd_memguard.runs.checkpoint import (
    find_checkpoint,
    prune_checkpoints,
    refuse_changes,
    save_checkpoint,
    temporary_folder,
)
from sd_memguard.runs.folder import ADAPTER, FOLDER, PROXIES_FOLDER
from sd_memguard.runs.trained_run import UNET
from sd_memguard.training.best import BestModel
from sd_memguard.training.failures import check_finite
from sd_memguard.training.plan import Plan
from sd_memguard.training.ranks import Ranks

logger = logging.getLogger(__name__)


class RunState:
    """All that changes during a run, and how it is written and read.

    Args:
        plan: what the run does.
        scalers: of the gradients under fp16.
        unet: the active UNet.
        ensemble: of the run.
        ranks: who trains what. All processes call each method that writes or averages.
        best: where the best model so far is kept, which checkpoints take with them.
    """

    def __init__(
        self,
        plan: Plan,
        scalers: ProxyScalers,
        unet: UNet2DConditionModel,
        ensemble: Ensemble,
        ranks: Ranks,
        best: BestModel,
    ) -> None:
        self.plan, self.config, self.scalers, self.unet = plan, plan.config, scalers, unet
        self.ensemble, self.proxies, self.guard, self.ranks = ensemble, ensemble.proxies, ensemble.guard, ranks
        self.best = best
        self.run_id = uuid.uuid4().hex  # under which trackers know the run
        self.last_saved_step = 0  # of the checkpoint written or gone on from last
        self.losses_before: dict[str, float] = {}  # of the validation images before training, where it is measured

    @contextmanager
    def aggregate(self) -> Iterator[UNet2DConditionModel | None]:
        """Give the aggregate as a plain UNet in float32, for as long as the block lasts; to the main process alone."""
        weights, is_main = self.guard.aggregation_weights(), self.ranks.is_main
        if isinstance(self.proxies, LoraProxies):
            changes = {} if self.ranks.by_batch and not is_main else self.proxies.changes(weights)
            yield merge(load_unet(self.plan.pipeline, self.config), changes) if is_main else None
            return
        with self.ensemble.averaged():
            if self.config.rank is None:
                yield self.unet if is_main else None
            else:
                yield self._merged() if is_main else None

    def _merged(self) -> UNet2DConditionModel:
        """Return a plain UNet with the adapter merged into it."""
        assert self.config.rank is not None
        base = load_unet(self.plan.pipeline, self.config)
        return merge_adapter(base, self.proxies.parameters, self.config.rank, self.config.adapter)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter where it is of another kind than LoRA, of which there is no average to be merged."""
        if self.config.adapter not in (None, "lora"):
            tensors = {name: parameter.detach().cpu() for name, parameter in self.proxies.parameters.items()}
            replace_file(folder / ADAPTER, lambda temporary: save_file(tensors, temporary))

    def save_checkpoint(self) -> None:
        """Write a checkpoint, then remove those beyond the limit."""
        output_dir, step = self.plan.output_dir, self.ensemble.progress.global_step
        if self.ranks.is_main:
            save_checkpoint(output_dir, step, self._write)
            prune_checkpoints(output_dir, self.config.checkpoints_total_limit)
        elif self.ranks.by_shard:
            self._write(temporary_folder(output_dir, step))
        else:
            with self.aggregate():  # the active weights rest in a store that the processes share
                pass
        self.ranks.exchange.barrier("checkpoint")
        self.last_saved_step = step

    def _write(self, folder: Path) -> None:
        private = folder / FOLDER
        if self.ranks.is_main:
            (private / PROXIES_FOLDER).mkdir(parents=True)
        self._wait_for_parts()
        with self.aggregate() as unet:
            if unet is not None:
                check_finite(unet)
                unet.save_pretrained(folder / UNET, max_shard_size="100GB")
                self.save_adapter(private)
        proxies = self.ensemble.save_proxies(private / PROXIES_FOLDER)
        scalers = self._gathered_scalers()
        if self.ranks.is_main:
            state = {
                "config": self.plan.shaping,
                "run_id": self.run_id,
                "ensemble": self.ensemble.state_dict(),
                "proxies": proxies,
                "scalers": scalers,
                "losses_before": self.losses_before,
            }
            save_state(state, private, "state")
            self.best.save_to(folder)
        self._wait_for_parts()

    def _gathered_scalers(self) -> list[dict[str, Any]]:
        """Return the state of each proxy's scale, from the process that trains it."""
        states = self.scalers.state()
        if not self.ranks.by_shard or not states:
            return states
        own = [(shard_index, states[shard_index]) for shard_index in self.ranks.shards]
        found = dict(row for rows in self.ranks.exchange.all_gather_object(own, "scalers") for row in rows)
        return [found[shard_index] for shard_index in range(len(states))]

    def _wait_for_parts(self) -> None:
        """Wait for the processes that write parts of the checkpoint of their own."""
        if self.ranks.by_shard:
            self.ranks.exchange.barrier("checkpoint")

    def resume(self) -> None:
        """Go on from the checkpoint that was asked for; without one, begin.

        Raises:
            CheckpointError: it is missing or damaged, or settings that shape the run have changed.
        """
        wanted = self.config.resume_from_checkpoint
        folder = self._find(wanted) if wanted else None
        if folder is None:
            if wanted:
                logger.warning("no checkpoint in %s yet: starting a new run", self.plan.output_dir)
            return
        state = load_state(folder / FOLDER, "state")
        with self.ranks.exchange.raise_on_any_rank():
            refuse_changes(state["config"], self.plan.shaping, folder)
        self.ensemble.load_state_dict(state["ensemble"])
        self.ensemble.load_proxies(folder / FOLDER / PROXIES_FOLDER, state["proxies"])
        self.scalers.load(state["scalers"], self.proxies.active)
        if self.ranks.is_main:
            self.best.restore_from(folder)
        self.run_id, self.last_saved_step = state["run_id"], self.ensemble.progress.global_step
        self.losses_before = state.get("losses_before", {})
        logger.info("going on from %s", folder)
        before, now = state["config"]["max_train_steps"], self.config.max_train_steps
        if before != now and "constant" not in self.config.lr_scheduler:
            logger.warning(
                "--max_train_steps is %d instead of %d: from here on the learning rate follows the longer curve",
                *(now, before),
            )

    def _find(self, wanted: str) -> Path | None:
        """Return the checkpoint, verified by the main process alone: it is as large as the run."""
        exchange, found = self.ranks.exchange, None
        with exchange.raise_on_any_rank():
            if exchange.is_main:
                found = find_checkpoint(self.plan.output_dir, wanted)
        name = exchange.broadcast_object(None if found is None else str(found), "checkpoint")
        return None if name is None else Path(name)
