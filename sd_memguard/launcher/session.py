"""One guarded run of a script: a few named functions of the libraries are replaced while it lasts, and counted."""

import argparse
import dataclasses
import logging
import os
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from sd_memguard.guard import MemorizationGuard
from sd_memguard.host_memory import available_memory
from sd_memguard.launcher.arguments import Command
from sd_memguard.launcher.losses import LossMatcher
from sd_memguard.launcher.records import data_dir, find_script_duplicates, sample_table
from sd_memguard.launcher.scripts import (
    TESTED,
    ScriptError,
    check_arguments,
    check_environment,
    check_source,
    total_steps,
)
from sd_memguard.proxies.lora import LoraProxies
from sd_memguard.runs.folder import FOLDER
from sd_memguard.runs.records import RunRecords, SampleTable

logger = logging.getLogger(__name__)

RAM_SHARE = 0.5
"""Share of the free memory that resting proxies may take before they go to files."""
COPIES = 3
"""Weights and the two moments of AdamW."""


class Session:
    """A script under the guard.

    Args:
        command: what to run.
    """

    def __init__(self, command: Command) -> None:
        self.command = command
        self.arguments: Any = None
        self.guard: MemorizationGuard | None = None
        self.matcher: LossMatcher | None = None
        self.records: RunRecords | None = None
        self.table: SampleTable | None = None
        self.emas: list[Any] = []
        self.calls: Counter[str] = Counter()
        self._finished = False
        self._kept = ExitStack()

    def run(self) -> None:
        """Run the script to its end.

        Raises:
            UserError: it cannot be run under the guard, or something in it was not what the guard relies on.
        """
        command = self.command
        check_environment()
        check_source(command.script)
        if command.script.name not in TESTED:
            logger.warning("%s is not among the tested scripts: %s", command.script.name, ", ".join(TESTED))
        sys.argv = [str(command.script), *command.arguments]
        sys.path.insert(0, str(command.script.resolve().parent))
        with self._patches():
            runpy.run_path(str(command.script), run_name="__main__")
        self._check_end()

    @contextmanager
    def _patches(self) -> Iterator[None]:
        """Replace what the script calls, for as long as it runs."""
        with ExitStack() as stack:
            replaced: list[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = [
                (argparse.ArgumentParser, "parse_args", self._parse_args),
                (EMAModel, "__init__", self._make_ema),
                (Accelerator, "prepare", self._prepare),
                (Accelerator, "wait_for_everyone", self._wait_for_everyone),
                (torch.nn.functional, "mse_loss", self._mse_loss),
                (huggingface_hub, "upload_folder", self._upload_folder),
            ]
            for owner, name, replacement in replaced:
                original = getattr(owner, name)
                setattr(owner, name, replacement(original))
                stack.callback(setattr, owner, name, original)
            yield

    # What takes the place of the libraries' functions.

    def _parse_args(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """See the script's flags, and refuse some before a model is loaded."""

        def parse_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
            namespace = original(parser, *args, **kwargs)
            if hasattr(namespace, "pretrained_model_name_or_path"):
                self.calls["parse_args"] += 1
                self.arguments = namespace
                check_arguments(namespace)
            return namespace

        return parse_args

    def _make_ema(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Get hold of the script's EMA."""

        def make_ema(ema: Any, *args: Any, **kwargs: Any) -> None:
            original(ema, *args, **kwargs)
            self.calls["EMAModel"] += 1
            self.emas.append(ema)

        return make_ema

    def _prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Put the guard in where the script prepares what it trains."""

        def prepare(accelerator: Any, *objects: Any, **kwargs: Any) -> Any:
            kinds = (UNet2DConditionModel, Optimizer, DataLoader)
            found = [next((o for o in objects if isinstance(o, kind)), None) for kind in kinds]
            if self.guard is not None or any(part is None for part in found):
                return original(accelerator, *objects, **kwargs)
            self.calls["prepare"] += 1
            return self._put_guard_in(accelerator, objects)

        return prepare

    def _wait_for_everyone(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Average for good before the script exports: all of them wait for each other first."""

        def wait_for_everyone(accelerator: Any) -> None:
            self.calls["wait_for_everyone"] += 1
            self._finish_if_over()
            original(accelerator)

        return wait_for_everyone

    def _mse_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Weigh the losses of the UNet."""

        def mse_loss(*args: Any, **kwargs: Any) -> Any:
            if self.matcher is None:
                return original(*args, **kwargs)
            self.calls["mse_loss"] += 1
            return self.matcher.mse_loss(*args, **kwargs)

        self._plain_mse_loss = original
        return mse_loss

    def _upload_folder(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Keep file names and captions, which the guard has written down, out of what the script uploads."""

        def upload_folder(*args: Any, ignore_patterns: list[str] | str | None = None, **kwargs: Any) -> Any:
            self.calls["upload_folder"] += 1
            patterns = [ignore_patterns] if isinstance(ignore_patterns, str) else list(ignore_patterns or [])
            return original(*args, ignore_patterns=[*patterns, f"{FOLDER}/*", f"*/{FOLDER}/*"], **kwargs)

        return upload_folder

    # What happens there.

    def _put_guard_in(self, accelerator: Any, objects: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.arguments is None:
            raise ScriptError(
                "the script reads its flags in another way than by argparse, so that its length is unknown"
            )
        check_arguments(self.arguments)  # the scheduler of the model may have turned EDM on
        models = [part for part in objects if isinstance(part, torch.nn.Module)]
        unet = next(model for model in models if isinstance(model, UNet2DConditionModel))
        others = [model for model in models if model is not unet]
        optimizer, schedule = (
            next((part for part in objects if isinstance(part, kind)), None) for kind in (Optimizer, LRScheduler)
        )
        loader = next(part for part in objects if isinstance(part, DataLoader))
        steps, config = total_steps(self.arguments, loader), self.command.guard
        if config.seed is None:
            config = replace(config, seed=getattr(self.arguments, "seed", None))
        dataset = loader.dataset
        groups = None if config.group_duplicates == "off" or config.is_neutral else find_script_duplicates(dataset)
        try:
            self.guard = guard = MemorizationGuard(config, len(dataset), groups=groups)  # type: ignore[arg-type]
        except ValueError as error:  # more shards than samples
            raise ScriptError(str(error)) from error
        output_dir = Path(self.arguments.output_dir)
        store_dir = output_dir / FOLDER / "proxies" if self._rests_on_disk(models, guard.num_shards) else None
        prepared = guard.prepare(
            accelerator,
            unet,
            optimizer,
            loader,
            schedule,
            total_steps=steps,
            models=others,
            ema=self.emas[-1] if self.emas else None,
            store_dir=store_dir,
        )
        by_role = dict(zip([unet, *others, optimizer, loader, schedule], prepared, strict=True))
        self.matcher = LossMatcher(guard, self._plain_mse_loss)
        self.matcher.watch(by_role[unet])
        assert guard.attachment is not None
        self.table = sample_table(dataset, self.arguments, guard.groups)
        self.records = RunRecords(output_dir)
        self.records.begin(self._record(steps))
        guard.attachment.ensemble.listeners.append(lambda row: self._write_records())
        logger.info("%s", self._plan_text(steps))
        return tuple(by_role[part] for part in objects)

    def _record(self, steps: int) -> dict[str, Any]:
        """Return what ``memguard/config.json`` says of the run: the guard's settings, resolved, and the script."""
        assert self.guard is not None
        assert self.guard.attachment is not None
        return {
            **dataclasses.asdict(self.guard.config),
            "memguard": "off" if self.guard.is_neutral else "on",
            "seed": self.guard.seed,
            "num_shards": self.guard.num_shards,
            "steps_per_round": self.guard.attachment.ensemble.schedule.steps_per_round,
            "max_train_steps": steps,
            "actions": [action._asdict() for action in self.guard.actions],
            "notices": self.guard.attachment.notices,
            "script": self.command.script.name,
            "train_data_dir": data_dir(self.arguments),
        }

    def _write_records(self) -> None:
        assert self.guard is not None
        assert self.guard.attachment is not None
        if self.records is not None and self.table is not None:
            self.records.write_rounds(self.guard.attachment.ensemble.rounds)
            self.records.write_samples(self.table, self.guard)
            self.records.write_curves(self.guard.rules)

    def _plan_text(self, steps: int) -> str:
        assert self.guard is not None
        assert self.guard.attachment is not None
        guard, schedule = self.guard, self.guard.attachment.ensemble.schedule
        if guard.is_neutral:
            return f"the guard is off: {steps} steps as the script takes them"
        sizes = ", ".join(map(str, guard.plan.sizes()))
        return f"guarded: {steps} steps in {schedule.num_rounds} round(s), shards of {sizes} samples"

    def _rests_on_disk(self, models: list[torch.nn.Module], num_shards: int) -> bool:
        if self.command.proxy_store != "auto":
            return self.command.proxy_store == "disk"
        trained = [p for model in models for p in model.parameters() if p.requires_grad]
        resting = COPIES * num_shards * sum(p.numel() * p.element_size() for p in trained)
        return num_shards > 1 and resting > RAM_SHARE * available_memory()

    def _finish_if_over(self) -> None:
        """Leave the aggregate in the model, for good, when the last step has been taken."""
        attachment = None if self.guard is None else self.guard.attachment
        if attachment is None or self._finished:
            return
        attachment.driver.advance_turn()
        if not attachment.ensemble.is_finished:
            return
        self._finished = True
        if isinstance(attachment.ensemble.proxies, LoraProxies):
            self._kept.enter_context(attachment.averaged(None))
        if self.records is not None:
            self._write_records()

    def _check_end(self) -> None:
        """Refuse to call a run guarded that was not.

        Raises:
            ScriptError: what the guard had to see did not happen.
        """
        if self.guard is None or self.matcher is None or self.guard.attachment is None:
            raise ScriptError(
                "the script has ended without preparing a UNet, an optimizer and a dataloader together, so that "
                "nothing was guarded"
            )
        driver, ensemble = self.guard.attachment.driver, self.guard.attachment.ensemble
        resumed_at_end = driver.batches_seen == 0 and ensemble.is_finished
        if driver.losses_seen != self.matcher.num_matched or (driver.losses_seen == 0 and not resumed_at_end):
            raise ScriptError(
                f"of {driver.batches_seen} batches the guard has seen {driver.losses_seen} losses; nothing that was "
                "written can be relied on as guarded"
            )
        if not self._finished:
            raise ScriptError(
                f"the script has ended after {ensemble.progress.global_step} of {ensemble.schedule.total_steps} steps, or "
                "has exported without `wait_for_everyone`; what it wrote is one proxy and not the mean of them"
            )
        logger.info(
            "%d steps, %d batches, %d losses weighed, %d of %d forwards matched, %d empty steps",
            ensemble.progress.global_step,
            driver.batches_seen,
            driver.losses_seen,
            self.matcher.num_matched,
            self.matcher.num_forwards,
            ensemble.progress.empty_steps,
        )


class _AboveBars(logging.Handler):
    """Writes lines to stderr so that the script's progress bar goes on below them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        tqdm.write(self.format(record), file=sys.stderr)


def configure_logging() -> None:
    """Show the guard's lines, whatever the script does to the root logger."""
    handler = _AboveBars()
    handler.setFormatter(logging.Formatter("%(asctime)s memguard: %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("sd_memguard")
    ours.addHandler(handler)
    ours.setLevel(os.environ.get("SD_MEMGUARD_LOG", "INFO"))
    ours.propagate = False
