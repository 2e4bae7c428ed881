"""Looking at the aggregate at a round's end: the probes' losses, and drawings of the validation prompts."""

import torch

from sd_memguard.training.batches import BatchSource, Encoders
from sd_memguard.training.logs import RunLog
from sd_memguard.training.loss import DenoisingLoss
from sd_memguard.training.ranks import Ranks
from sd_memguard.training.records import RunRecords
from sd_memguard.training.run_state import RunState
from sd_memguard.training.setup import Plan
from sd_memguard.training.validation import LossProbe, MeanLoss, draw_prompts


class Look:
    """What is measured and drawn with the aggregate; with several processes the main one does it.

    Args:
        plan: what the run does.
        source: makes the batches of the training pictures.
        encoders: the frozen networks, for those of the held-out ones.
        num_timesteps: number of timesteps of the noise schedule.
        is_main: whether this process is the one that looks.
    """

    def __init__(
        self, plan: Plan, source: BatchSource, encoders: Encoders, num_timesteps: int, *, is_main: bool
    ) -> None:
        self.plan, self.config = plan, plan.config
        self.probes: dict[str, LossProbe] = {}
        if plan.heldout is not None and is_main:
            heldout = BatchSource(plan.heldout, encoders, self.config, plan.seed, cache=False)
            self.probes = {
                name: LossProbe(source, plan.seed, num_timesteps, self.config.train_batch_size)
                for name, source in (("train_loss", source), ("heldout_loss", heldout))
            }

    @property
    def prompts(self) -> list[str]:
        """The captions to draw: ``--validation_prompts`` once each, ``--validation_prompt`` several times."""
        config = self.config
        repeated = [config.validation_prompt] * (config.num_validation_images or 0) if config.validation_prompt else []
        return [*(config.validation_prompts or ()), *repeated]

    def at_round_end(
        self, state: RunState, ranks: Ranks, records: RunRecords, loss: DenoisingLoss, log: RunLog
    ) -> dict[str, MeanLoss]:
        """Return the probes' losses of the aggregate, and draw with it when that is due.

        All processes call it: they share the proxies, or the store where these rest.
        """
        draws = self._drawing_is_due(state, records)
        if self.plan.heldout is None and not draws:
            return {}
        # Not compiled: these few forwards are not worth another compilation.
        averaged = state.proxies.averaged(state.guard.aggregation_weights())
        with averaged, torch.compiler.set_stance("force_eager"):
            if not ranks.is_main:
                return {}
            if draws:
                self._draw(state, log)
            return {name: probe.measure(state.unet, loss) for name, probe in self.probes.items()}

    def _drawing_is_due(self, state: RunState, records: RunRecords) -> bool:
        """Say whether a multiple of ``--validation_epochs`` passes was completed, or the first or last round ends."""
        if not self.prompts:
            return False
        progress, per_epoch = state.progress, self.plan.pass_length
        done = progress.global_step * self.plan.visits_per_step // per_epoch
        steps_before = records.rounds[-1]["global_step"] if records.rounds else 0
        before, every = steps_before * self.plan.visits_per_step // per_epoch, self.config.validation_epochs
        last = self.plan.schedule.num_rounds - 1
        return done // every > before // every or progress.round_index in {0, last}

    def _draw(self, state: RunState, log: RunLog) -> None:
        folder, variant, seed = self.plan.pipeline, self.config.variant, self.plan.seed
        images = draw_prompts(folder, state.unet, self.prompts, state.accelerator, seed, variant)
        log.drawings(images, state.progress.global_step)
