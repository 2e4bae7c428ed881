"""Several processes: how they are started, who trains what, and how those that train one batch together agree on it."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sd_memguard.config import ConfigError
from sd_memguard.distributed import ProcessGroup
from sd_memguard.environment import configured_spreading, launched_processes
from sd_memguard.training.signals import StopRequest

Item = TypeVar("Item")

TIMEOUT = timedelta(hours=6)
"""How long a process waits for the others: for the check of the images, for the slowest one at a round's end."""
KNOWN_KINDS = {"NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_SDAA"}


def process_handlers() -> list[KwargsHandler]:
    """Return how accelerate is to join the processes, and to exchange gradients: without a second copy of them."""
    return [InitProcessGroupKwargs(timeout=TIMEOUT), DistributedDataParallelKwargs(gradient_as_bucket_view=True)]


def check_launch() -> None:
    """Refuse what spreads one model over processes.

    Raises:
        ConfigError: names it.
    """
    name = configured_spreading()
    if name is not None:
        raise _spread_error(name)


def check_joined(accelerator: Accelerator) -> None:
    """Refuse processes that do not know of each other, and kinds of training that are not known to work.

    Raises:
        ConfigError: says what was found and what works.
    """
    kind = accelerator.distributed_type.name
    if kind not in KNOWN_KINDS:
        raise _spread_error(kind)
    launched = launched_processes()
    if launched != accelerator.num_processes:
        raise ConfigError(
            f"{launched} processes were launched, but accelerate has joined {accelerator.num_processes}: each would "
            "train the whole run alone. Without GPUs start them with `ACCELERATE_USE_CPU=true torchrun "
            "--nproc_per_node N` (`accelerate launch --cpu` starts one process, whatever `--num_processes` says)"
        )


def _spread_error(name: str) -> ConfigError:
    return ConfigError(
        f"accelerate is configured for {name}, which spreads one model over the processes, while each proxy is a whole "
        "model here, which is swapped, averaged and saved as one; run `accelerate config` without it. Several "
        "processes work as they are (torchrun, or `accelerate launch --multi_gpu`)"
    )


class Ranks:
    """Who trains what.

    With more than one shard, and a number of shards that the processes divide, each process trains its own shards
    (`by_shard`); otherwise all train one shard at a time, each a slice of every batch (`by_batch`).

    Args:
        exchange: the processes.
        num_shards: number of shards.
        slice_size: the most samples of a batch that one process takes.

    Attributes:
        stop: where this process hears of a signal.
        signal: number of the signal that any process had heard of at the last ``gather_batch``; 0 for none.
    """

    def __init__(self, exchange: ProcessGroup, num_shards: int, slice_size: int) -> None:
        self.exchange, self.slice_size = exchange, slice_size
        self.by_shard = exchange.size > 1 and divides(exchange.size, num_shards)
        self.by_batch = exchange.size > 1 and not self.by_shard
        self.shards = range(exchange.rank, num_shards, exchange.size) if self.by_shard else range(num_shards)
        self.slices = batch_slices(exchange.size, num_shards)
        self.stop, self.signal = StopRequest(), 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.exchange.is_main

    @property
    def proxy_exchange(self) -> ProcessGroup:
        """The processes that share the proxies: all where each has its own shards, else this one alone."""
        return self.exchange if self.by_shard else ProcessGroup(alone=True)

    @property
    def local_stores(self) -> float:
        """How many stores of all proxies the processes of this machine hold together, where they rest in memory."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return local if self.by_batch else local / self.exchange.size if self.by_shard else 1

    def slice_of(self, batch: Sequence[Item]) -> list[Item]:
        """Return what this process takes of a batch, of ``slices * slice_size`` at most: a part as large as others."""
        size = -(-len(batch) // self.slices)
        position = self.exchange.rank if self.by_batch else 0
        return list(batch[position * size : (position + 1) * size])

    def gather_batch(self, losses: Tensor, timesteps: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses, timesteps and sample ids of all slices, (B,) each, in the order of the processes.

        The losses of this process keep their graph, those of the others have none: a sum over all of them gives the
        gradient of its own slice. Where processes do not share a batch nothing is changed.

        Args:
            losses: (b,) float32 with graph.
            timesteps: (b,) int64.
            sample_ids: (b,) int64 on the CPU.
        """
        if not self.by_batch:
            return losses, timesteps, sample_ids
        # One exchange for all: float64 holds each of them exactly. Images may be lost, so slices may be shorter.
        rows = torch.zeros(1 + self.slice_size, 3, dtype=torch.float64)
        rows[0, 0], rows[0, 1] = len(sample_ids), self.stop.number
        rows[1 : 1 + len(sample_ids)] = torch.stack(
            [column.detach().cpu().double() for column in (losses, timesteps, sample_ids)], dim=1
        )
        found = self.exchange.all_gather(rows, "batch")
        self.signal = max(self.signal, int(found[:, 0, 1].max()))
        parts = [part[1 : 1 + int(part[0, 0])] for part in found]
        all_losses = [part[:, 0].to(losses.device, losses.dtype) for part in parts]
        all_losses[self.exchange.rank] = losses
        together = torch.cat(parts).long()
        return torch.cat(all_losses), together[:, 1].to(timesteps.device), together[:, 2]

    def count(self, number: int) -> int:
        """Return the sum of a number over the processes that share a batch."""
        return int(self.exchange.all_reduce(torch.tensor([number]), "batch")) if self.by_batch else number

    def mean(self, losses: Tensor, number: int) -> Tensor:
        """Return what to backward for some of ``number`` losses so that the mean over the processes is that of all."""
        return losses.sum() * (self.slices / number) if self.by_batch else losses.sum() / number

    def accumulates(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Return a context for the forward and backward of a batch: gradients are exchanged in the last one alone."""
        if last or not self.by_batch:
            return nullcontext()
        assert isinstance(model, DistributedDataParallel)
        return model.no_sync()


def divides(num_processes: int, num_shards: int) -> bool:
    """Say whether each process can have shards of its own."""
    return num_shards > 1 and num_shards % num_processes == 0


def batch_slices(num_processes: int, num_shards: int) -> int:
    """Return in how many slices each batch is trained: 1 where processes have shards of their own."""
    return 1 if divides(num_processes, num_shards) else num_processes
