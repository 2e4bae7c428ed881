"""How several processes begin a run together: the main one looks at everything first and tells the others."""

import logging
import os
import secrets
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sd_memguard.config import TrainConfig
from sd_memguard.data.samples import BadSample, Checked, Samples
from sd_memguard.distributed import ProcessGroup, ProcessLostError
from sd_memguard.environment import launched_processes
from sd_memguard.errors import UserError
from sd_memguard.runs.folder import FOLDER, RunFolderError
from sd_memguard.training.plan import Plan, VerifiedImages, make_plan
from sd_memguard.training.signals import Interrupted

logger = logging.getLogger(__name__)

TOKEN = "processes"
"""File of the run folder by which the processes find out whether they see the same one."""


def silence_non_main(exchange: ProcessGroup, level: int = logging.ERROR) -> None:
    """Leave it to the main process to say what all of them find; from ``level`` on the others speak, too."""
    if not exchange.is_main:
        logging.getLogger("sd_memguard").setLevel(level)


def raise_together(error: UserError | None, exchange: ProcessGroup) -> None:
    """Raise what all processes may have met: the main process says it, another one only where the main one has not."""
    for speaks in (exchange.is_main, True):
        with exchange.raise_on_any_rank():
            if error is not None and speaks:
                raise error


def plan_together(config: TrainConfig, exchange: ProcessGroup) -> Plan:
    """Return the plan of a run, with the images checked and models downloaded by the main process first.

    Raises:
        UserError: see ``make_plan``.
        RefusedElsewhere: met by another process.
    """
    if exchange.size == 1:
        return make_plan(config)
    plan: Plan | None = None
    with exchange.raise_on_any_rank():
        if exchange.is_main:
            plan = make_plan(config, exchange.size)
    seed = exchange.broadcast_object(None if plan is None else plan.seed, "plan")
    train = _share_checked(None if plan is None else plan.samples, exchange)
    heldout = _share_checked(plan.heldout if plan is not None else None, exchange)
    with exchange.raise_on_any_rank():
        if plan is None:
            assert train is not None
            plan = make_plan(replace(config, seed=seed), exchange.size, VerifiedImages(train, heldout))
    assert plan is not None
    return plan


def _share_checked(samples: Samples | None, exchange: ProcessGroup) -> Checked | None:
    """Return what the main process knows of its samples, None where it has none."""
    tensors: dict[str, Tensor] | None = None
    if exchange.is_main:
        arrays: dict[str, Any] = {} if samples is None else {"sizes": samples.sizes, "groups": samples.groups}
        if samples is not None and samples.keys is not None:
            arrays["keys"] = samples.keys.view(np.uint8).reshape(-1, 16)
        if samples is not None and samples.masked is not None:
            arrays["masked"] = samples.masked.astype(np.uint8)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
    shared = exchange.broadcast_tensors(tensors, "plan")
    bad = exchange.broadcast_object([] if samples is None else samples.bad, "plan")
    if "sizes" not in shared:
        return None
    groups = shared["groups"].numpy() if "groups" in shared else None
    keys = shared["keys"].numpy().reshape(-1).view("S16") if "keys" in shared else None
    masked = shared["masked"].numpy().astype(bool) if "masked" in shared else None
    return Checked(shared["sizes"].numpy(), [BadSample(*one) for one in bad], groups, keys, masked)


@contextmanager
def main_alone(exchange: ProcessGroup, work: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context in the main process only; where that is refused, all processes end."""
    with ExitStack() as stack:
        with exchange.raise_on_any_rank():
            if exchange.is_main:
                stack.enter_context(work)
        yield


@contextmanager
def told_when_lost() -> Iterator[None]:
    """Say at once that another process was lost: the launcher may end this one before its traceback is out."""
    try:
        yield
    except ProcessLostError as error:
        logger.error("%s", error)
        raise


@contextmanager
def leaving_together(exchange: ProcessGroup) -> Iterator[None]:
    """Take the process group down at the end of a run, when all processes have come there.

    After an error it stays: taking it down is collective under NCCL, and the others do not come.
    """
    stopped = None
    try:
        yield
    except Interrupted as error:  # all of them are, by agreement
        stopped = error
    if exchange.size > 1:
        exchange.barrier("end")
        torch.distributed.destroy_process_group()
    if stopped is not None:
        raise stopped


@contextmanager
def hard_exit() -> Iterator[None]:
    """End one of several processes at once when an error leaves the block, with what Python would print and return.

    The others wait for this process in a collective, and end when their launcher sees that it has ended. What torch
    does at the orderly end of a process may wait for them in turn.
    """
    try:
        yield
    except BaseException as error:
        if launched_processes() == 1:
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        codes = {UserError: 2, KeyboardInterrupt: 128 + signal.SIGINT}
        code = next((code for kind, code in codes.items() if isinstance(error, kind)), 1)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(error.code or 0) if isinstance(error, SystemExit) else code)


def check_shared(output_dir: Path, exchange: ProcessGroup) -> None:
    """Refuse an output folder that is not the same one for all processes: each writes its part of a checkpoint there.

    Raises:
        RunFolderError: names the machine that sees another folder.
    """
    if exchange.size == 1:
        return
    file = output_dir / FOLDER / TOKEN
    token = exchange.broadcast_object(secrets.token_hex(8), "plan")
    if exchange.is_main:
        file.write_text(token, encoding="utf-8")
    exchange.barrier("plan")
    with exchange.raise_on_any_rank():
        if not file.is_file() or file.read_text(encoding="utf-8") != token:
            raise RunFolderError(
                f"`--output_dir` {output_dir} on {socket.gethostname()} (process {exchange.rank}) is not the folder "
                "that the main process writes to: with several machines it must lie on a disk that all of them share"
            )
    if exchange.is_main:
        file.unlink(missing_ok=True)
