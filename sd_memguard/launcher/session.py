"""One guarded run of a script: what the script calls of its libraries is watched while it lasts.

A script that uses accelerate is guarded where it prepares its optimizer; any other where it first calls a denoiser that
an optimizer trains. Either way the row gate does the rest, and the script's loss is not touched. Needs torch alone:
what is not installed is not watched.
"""

import argparse
import dataclasses
import functools
import gc
import logging
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from sd_memguard.errors import LoopError
from sd_memguard.guard import MemorizationGuard
from sd_memguard.launcher.arguments import Command
from sd_memguard.launcher.denoisers import (
    find_denoisers,
    find_trained_denoiser,
    trained_parameters,
    watch_calls,
)
from sd_memguard.launcher.records import BareRecords, data_dir, find_script_duplicates, sample_table
from sd_memguard.launcher.scripts import (
    ScriptError,
    caches_by_step,
    check_flags,
    check_resume,
    check_script,
    output_folder,
    total_steps,
)
from sd_memguard.plugin.attach import Attachment, Loop, LoopOptions, plan_loop, prepare
from sd_memguard.plugin.backends import AccelerateBackend, PlainBackend, plain_optimizer
from sd_memguard.plugin.checkpoint import FOLDER
from sd_memguard.plugin.checks import why_unnumbered
from sd_memguard.plugin.loop_driver import LoopDriver
from sd_memguard.proxies.lora import LoraProxies

logger = logging.getLogger(__name__)

RAM_SHARE = 0.5
"""Share of the free memory that offloaded proxies may take before they go to files."""
COPIES = 3
"""Weights and the two moments of AdamW."""
LENGTH_FLAGS = ("max_train_steps", "num_train_epochs", "max_train_epochs", "output_dir")
"""Flags by which the arguments of a training script are known."""
RECORDED_FLAGS = (
    "pretrained_model_name_or_path",
    "train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler",
    "resolution",
    "rank",
    "dataset_name",
)
"""Flags of the script that ``memguard/config.json`` repeats."""


class Session:
    """A script under the guard.

    Args:
        command: what to run.
    """

    def __init__(self, command: Command) -> None:
        self.command = command
        self.source = command.script.read_text(encoding="utf-8")
        self.arguments: Any = None
        self.guard: MemorizationGuard | None = None
        self.denoiser: nn.Module | None = None
        self.records: Any = None
        self.table: Any = None
        self.emas: list[Any] = []
        self._finished = False
        self._kept = ExitStack()

    @property
    def attachment(self) -> Attachment | None:
        """The guard's presence in the script's loop, once there is one."""
        return None if self.guard is None else self.guard.attachment

    def run(self) -> None:
        """Run the script to its end.

        Raises:
            UserError: it cannot be run under the guard, or something in it was not what the guard relies on.
        """
        command = self.command
        check_script(command)
        sys.argv = [str(command.script), *command.arguments]
        sys.path.insert(0, str(command.script.resolve().parent))
        with self._patches(), watch_calls(self._on_call, command.denoisers):
            runpy.run_path(str(command.script), run_name="__main__")
        self._check_end()

    @contextmanager
    def _patches(self) -> Iterator[None]:
        """Replace what the script calls, for as long as it runs."""
        with ExitStack() as stack:
            replaced: list[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = [
                (argparse.ArgumentParser, "parse_known_args", self._parse_known_args)
            ]
            if find_spec("accelerate") is not None:
                accelerator = import_module("accelerate").Accelerator
                replaced.append((accelerator, "prepare", self._prepare))
                replaced.append((accelerator, "wait_for_everyone", self._wait_for_everyone))
            if "EMAModel" in self.source and find_spec("diffusers") is not None:
                replaced.append((import_module("diffusers.training_utils").EMAModel, "__init__", self._make_ema))
            if find_spec("huggingface_hub") is not None:
                replaced.append((import_module("huggingface_hub"), "upload_folder", self._upload_folder))
            for owner, name, replacement in replaced:
                original = getattr(owner, name)
                setattr(owner, name, replacement(original))
                stack.callback(setattr, owner, name, original)
            yield

    # What takes the place of the libraries' functions.

    def _parse_known_args(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """See the script's flags, and refuse some before a model is loaded."""

        def parse_known_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
            namespace, rest = original(parser, *args, **kwargs)
            if self.arguments is None and any(hasattr(namespace, flag) for flag in LENGTH_FLAGS):
                self.arguments = namespace
                check_flags(namespace)
            return namespace, rest

        return parse_known_args

    def _make_ema(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Get hold of the script's EMA."""

        def make_ema(ema: Any, *args: Any, **kwargs: Any) -> None:
            original(ema, *args, **kwargs)
            self.emas.append(ema)

        return make_ema

    def _prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Put the guard in where the script prepares its optimizer."""

        def prepare(accelerator: Any, *objects: Any, **settings: Any) -> Any:
            if self.guard is not None or not any(isinstance(part, Optimizer) for part in objects):
                return original(accelerator, *objects, **settings)
            return self._put_guard_in(accelerator, objects, functools.partial(original, accelerator, **settings))

        return prepare

    def _wait_for_everyone(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Average for good before the script exports: all of them wait for each other first."""

        def wait_for_everyone(accelerator: Any) -> None:
            self._finish_if_over()
            original(accelerator)

        return wait_for_everyone

    def _upload_folder(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Keep file names and captions, which the guard has written down, out of what the script uploads."""

        def upload_folder(*args: Any, ignore_patterns: list[str] | str | None = None, **kwargs: Any) -> Any:
            patterns = [ignore_patterns] if isinstance(ignore_patterns, str) else list(ignore_patterns or [])
            return original(*args, ignore_patterns=[*patterns, f"{FOLDER}/*", f"*/{FOLDER}/*"], **kwargs)

        return upload_folder

    # A script with accelerate.

    def _put_guard_in(self, accelerator: Any, objects: tuple[Any, ...], call: Callable[..., Any]) -> Any:
        optimizer, dataloader, schedule = (
            next((part for part in objects if isinstance(part, kind)), None)
            for kind in (Optimizer, DataLoader, LRScheduler)
        )
        denoiser = find_trained_denoiser(plain_optimizer(optimizer), objects, self.command.denoisers)
        if self.arguments is not None:
            check_flags(self.arguments)
        guard, notices = self._make_guard(dataloader)
        steps = None if self.arguments is None else total_steps(self.arguments, dataloader)
        options = LoopOptions(
            total_steps=steps,
            gradient_accumulation_steps=int(getattr(accelerator, "gradient_accumulation_steps", 1)),
            models=[part for part in objects if isinstance(part, nn.Module) and part is not denoiser],
            ema=self.emas[-1] if self.emas else None,
        )
        known = dataloader if guard.has_ids else None
        loop = Loop(denoiser, optimizer, known, schedule, AccelerateBackend(accelerator), options)
        plan = plan_loop(guard, loop)
        check_resume(self.source, self.arguments, guard.num_shards)
        if guard.num_shards == 1:  # nothing is exchanged, and an EMA averages what it always does
            loop.options = replace(options, ema=None, models=())
        elif self._stores_on_disk([*loop.models], guard.num_shards):
            folder = output_folder(self.arguments) or Path(tempfile.mkdtemp())
            loop.options = replace(options, store_dir=folder / FOLDER / "proxies")
        plan.notices[:0] = notices
        guard.attachment, prepared = prepare(guard, accelerator, loop, objects, plan=plan, call=call)
        self._begin(guard, denoiser, plain_optimizer(optimizer), dataloader if guard.has_ids else None, steps)
        return prepared[0] if len(prepared) == 1 else tuple(prepared)  # as accelerate does

    def _make_guard(self, dataloader: Any) -> tuple[MemorizationGuard, list[str]]:
        """Return the guard for a script's dataloader, and what it cannot do there.

        Raises:
            ScriptError: several shards are wanted of samples that have no numbers, or more shards than samples.
        """
        config = self.command.guard
        if config.seed is None:
            config = replace(config, seed=getattr(self.arguments, "seed", None))
        reason = "there is no dataloader beside the optimizer" if dataloader is None else why_unnumbered(dataloader)
        if reason is None and caches_by_step(self.source, self.arguments):
            reason = "the script pairs cached latents with batches by their position; leave `--cache_latents` out"
        if reason is not None:
            if config.num_shards not in ("auto", 1):
                raise ScriptError(f"`--num_shards {config.num_shards}` cannot be had: {reason}")
            config = replace(config, num_shards=1)
            why = reason.partition(";")[0]
            notice = (
                f"which sample is which is not known, since {why}. Samples are skipped by their loss, but not counted, "
                "and near-duplicates count each: `sd-memguard check` finds them before training"
            )
            return MemorizationGuard(config), [] if config.is_neutral else [notice]
        dataset = dataloader.dataset
        looked_for = config.group_duplicates != "off"
        groups = find_script_duplicates(dataset, flip=config.duplicates_flip) if looked_for else None
        try:
            return MemorizationGuard(config, len(dataset), groups=groups), []
        except ValueError as error:  # more shards than samples
            raise ScriptError(str(error)) from error

    def _stores_on_disk(self, models: list[nn.Module], num_shards: int) -> bool:
        if self.command.proxy_store != "auto":
            return self.command.proxy_store == "disk"
        from sd_memguard.host_memory import available_memory  # which needs psutil

        trained = [p for model in models for p in model.parameters() if p.requires_grad]
        offloaded = COPIES * num_shards * sum(p.numel() * p.element_size() for p in trained)
        return offloaded > RAM_SHARE * available_memory()

    # Any other trainer.

    def _on_call(self, module: nn.Module) -> bool:
        """Put the guard in where a denoiser is called that an optimizer trains, and say whether it is in."""
        if self.guard is not None:
            return True
        optimizers = [o for o in gc.get_objects() if issubclass(type(o), Optimizer) and o.param_groups]
        optimizers = list({id(o): o for o in map(plain_optimizer, optimizers)}.values())
        if not optimizers:
            return False
        training = [o for o in optimizers if trained_parameters(module, o)]
        if not training:
            others = find_denoisers(self.command.denoisers)
            if not any(trained_parameters(other, o) for other in others for o in optimizers):
                find_trained_denoiser(optimizers[-1], (), self.command.denoisers)  # refuses, and says why
            return False  # the teacher of one that is trained
        if len(training) > 1:
            raise LoopError(
                f"{len(training)} optimizers train {type(module).__name__}, and the guard watches the steps of one; "
                "train it by one optimizer"
            )
        guard, notices = self._make_guard(None)
        loop = Loop(module, training[0], None, None, PlainBackend(), LoopOptions())
        plan = plan_loop(guard, loop)
        plan.notices[:0] = notices
        guard.attachment = Attachment(guard, loop, plan, module)
        steps = None if self.arguments is None else total_steps(self.arguments, None)
        self._begin(guard, module, training[0], None, steps)
        return True

    # What is written down.

    def _begin(
        self, guard: MemorizationGuard, denoiser: nn.Module, optimizer: Optimizer, dataloader: Any, steps: int | None
    ) -> None:
        assert guard.attachment is not None
        self.guard, self.denoiser = guard, denoiser
        for notice in guard.attachment.notices:
            logger.warning("%s", notice)
        output_dir = output_folder(self.arguments)
        if output_dir is not None and int(os.environ.get("RANK", "0")) == 0:
            self.records = _open_records(output_dir)
            self.records.begin(self._record(denoiser, optimizer, steps))
            if dataloader is not None:
                self.table = sample_table(dataloader.dataset, self.arguments, guard.groups)
        guard.attachment.ensemble.listeners.append(lambda row: self._write_records())
        with _logging_enabled():
            logger.info("%s", self._plan_text(steps))

    def _record(self, denoiser: nn.Module, optimizer: Optimizer, steps: int | None) -> dict[str, Any]:
        """Return what ``memguard/config.json`` says of the run: the guard's settings, resolved, and the script."""
        assert self.guard is not None
        assert self.guard.attachment is not None
        trained = {id(p) for p in trained_parameters(denoiser, optimizer)}
        whole = all(id(p) in trained for p in denoiser.parameters() if p.requires_grad) and any(
            id(p) in trained and "lora" not in name for name, p in denoiser.named_parameters()
        )
        flags = {name: getattr(self.arguments, name) for name in RECORDED_FLAGS if hasattr(self.arguments, name)}
        return {
            **dataclasses.asdict(self.guard.config),
            "memguard": "off" if self.guard.is_neutral else "on",
            "seed": self.guard.seed,
            "num_shards": self.guard.num_shards,
            "sample_rule": self.guard.sample_rule,
            "steps_per_round": self.guard.attachment.ensemble.schedule.steps_per_round,
            "max_train_steps": steps,
            "actions": [action._asdict() for action in self.guard.actions],
            "notices": self.guard.attachment.notices,
            "script": self.command.script.name,
            "denoiser": type(denoiser).__name__,
            "proxy": "full" if whole else "lora",
            "train_data_dir": data_dir(self.arguments),
            **{name: value if isinstance(value, int | float | None) else str(value) for name, value in flags.items()},
        }

    def _write_records(self) -> None:
        if self.records is None or self.attachment is None:
            return
        self.records.write_rounds(self.attachment.ensemble.rounds)
        self.records.write_curves(self.attachment.guard.rules)
        if self.table is not None:
            self.records.write_samples(self.table, self.attachment.guard)

    def _plan_text(self, steps: int | None) -> str:
        assert self.guard is not None
        assert self.attachment is not None
        guard, name = self.guard, type(self.denoiser).__name__
        length = "an unknown number of" if steps is None else steps
        if guard.is_neutral:
            return f"the guard is off: {length} steps as the script takes them"
        text = f"guarded: {name}, {length} steps"
        if guard.num_shards > 1:
            sizes = ", ".join(map(str, guard.plan.sizes()))
            text += f" in {self.attachment.ensemble.schedule.num_rounds} round(s), shards of {sizes} samples"
        return text

    # The end.

    def _finish_if_over(self) -> None:
        """Leave the aggregate in the model, for good, when the last step has been taken."""
        attachment = self.attachment
        if attachment is None or self._finished or attachment.guard.num_shards == 1:
            return
        attachment.driver.advance_turn()
        if not attachment.ensemble.is_finished:
            return
        self._finished = True
        if isinstance(attachment.ensemble.proxies, LoraProxies):
            self._kept.enter_context(attachment.averaged(None))
        self._write_records()

    def _check_end(self) -> None:
        """Refuse to call a run guarded that was not.

        Raises:
            ScriptError: what the guard had to see did not happen.
        """
        attachment = self.attachment
        if attachment is None:
            raise ScriptError(
                "the script has ended and has never called a denoiser that an optimizer trains, so that nothing was "
                "guarded; `--denoiser CLASS` names its class where the guard does not know it"
            )
        driver, ensemble = attachment.driver, attachment.ensemble
        progress, guard = ensemble.progress, attachment.guard
        resumed_at_end = driver.batches_seen == 0 and (guard.num_shards == 1 or ensemble.is_finished)
        if driver.losses_seen == 0 and not (resumed_at_end and progress.global_step):
            raise ScriptError(
                f"the script has ended, and of {driver.batches_seen} batches the guard has seen no gradient at the "
                f"output of {type(self.denoiser).__name__}, so that nothing was guarded"
            )
        if not progress.global_step:
            raise ScriptError(
                f"the script has ended, and in {driver.losses_seen} batches that were judged no step of its optimizer "
                "was seen, so that none could be left out: it is stepped in another way than by its `step`"
            )
        if guard.num_shards > 1 and not self._finished:
            raise ScriptError(
                f"the script has ended after {progress.global_step} of {ensemble.schedule.total_steps} steps, or has "
                "exported without `wait_for_everyone`; what it wrote is one proxy and not the mean of them"
            )
        driver.record()
        self._write_records()
        summary = {
            "global_step": progress.global_step,
            "empty_steps": progress.empty_steps,
            "samples_judged": driver.samples_judged,
            "samples_skipped": driver.samples_skipped,
            "samples_to_augment": driver.samples_to_augment,
        }
        if self.records is not None:
            self.records.write_summary(summary)
        with _logging_enabled():
            logger.info("%s", _closing_text(driver))


def _closing_text(driver: LoopDriver) -> str:
    """Return what was done, counted; copies are trained without being judged."""
    progress, share = driver.ensemble.progress, driver.samples_skipped / max(driver.samples_judged, 1)
    parts = [
        f"{progress.global_step} steps",
        f"{driver.losses_seen - driver.copies_seen} batches judged",
        f"{driver.samples_skipped} of {driver.samples_judged} samples skipped ({share:.0%})",
    ]
    if driver.samples_to_augment:
        parts.append(f"{driver.samples_to_augment} to augment, {driver.copies_seen} batches of copies")
    return ", ".join([*parts, f"{progress.empty_steps} steps not taken since no sample of theirs was kept"])


def _open_records(output_dir: Path) -> Any:
    """Return what writes ``memguard/``; where pyarrow is not installed, JSON files alone."""
    if find_spec("pyarrow") is None:
        return BareRecords(output_dir)
    from sd_memguard.runs.records import RunRecords

    return RunRecords(output_dir)


@contextmanager
def _logging_enabled() -> Iterator[None]:
    """Log what says that the guard works also where a script has disabled logging altogether, as ai-toolkit does."""
    level = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    try:
        yield
    finally:
        logging.disable(level)


class _AboveBars(logging.Handler):
    """Writes lines to stderr so that the script's progress bar goes on below them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(self.format(record), file=sys.stderr)
        else:
            print(self.format(record), file=sys.stderr)


def configure_logging() -> None:
    """Show the guard's lines, whatever the script does to the root logger."""
    handler = _AboveBars()
    handler.setFormatter(logging.Formatter("%(asctime)s memguard: %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("sd_memguard")
    ours.addHandler(handler)
    ours.setLevel(os.environ.get("SD_MEMGUARD_LOG", "INFO"))
    ours.propagate = False
