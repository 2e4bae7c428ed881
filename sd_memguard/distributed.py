"""What the processes of one run tell each other, by torch.distributed: numbers and text, never pickled objects."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sd_memguard.errors import UserError

MAIN = 0
"""Rank of the process that writes what is written once."""


class ProcessLostError(RuntimeError):
    """Another process of the run has ended or cannot be reached."""


class RefusedElsewhere(SystemExit):
    """Another process has met a user's error and says it; this one ends with the same status, silently."""


class ProcessGroup:
    """The processes of a run as seen by one of them; a process alone exchanges nothing and pays nothing.

    Every method but the properties is a collective: all processes call it, in the same order.

    Args:
        device: where the backend wants its tensors (NCCL: the GPU, gloo: the CPU).
        alone: leave other processes out of it, also where there are some.

    Attributes:
        sent: bytes this process has handed over, by purpose. A ring passes on ``2 (size - 1) / size`` times those of a
            sum, and ``size - 1`` times those that are gathered.
    """

    def __init__(self, device: torch.device | str = "cpu", *, alone: bool = False) -> None:
        joined = not alone and dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (MAIN, 1)
        self.device = torch.device(device)
        self.sent: Counter[str] = Counter()

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == MAIN

    def all_reduce(self, tensor: Tensor, purpose: str) -> Tensor:
        """Return the sum of the processes' tensors, the same bits everywhere; the argument may be overwritten."""
        if self.size == 1:
            return tensor
        placed = tensor.to(self.device).contiguous()
        with self._sending(purpose, placed):
            dist.all_reduce(placed)
            return placed.to(tensor.device)

    def all_gather(self, tensor: Tensor, purpose: str) -> Tensor:
        """Return the processes' tensors, equal in shape, one after another: (size, ...)."""
        if self.size == 1:
            return tensor[None]
        placed = tensor.to(self.device).contiguous()
        parts = [torch.empty_like(placed) for _ in range(self.size)]
        with self._sending(purpose, placed):
            dist.all_gather(parts, placed)
            return torch.stack(parts).to(tensor.device)

    def all_gather_object(self, value: Any, purpose: str) -> list[Any]:
        """Return the JSON value of each process, in the order of ranks."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self.all_gather(torch.tensor([len(text)]), purpose).flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(text)] = text
        rows = self.all_gather(padded, purpose)
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]

    def broadcast_object(self, value: Any, purpose: str, source: int = MAIN) -> Any:
        """Return the JSON value of one process to all."""
        return self.all_gather_object(value if self.rank == source else None, purpose)[source]

    def broadcast_tensors(
        self, tensors: Mapping[str, Tensor] | None, purpose: str, source: int = MAIN
    ) -> dict[str, Tensor]:
        """Return the named tensors of one process to all, on the CPU; the others give None."""
        if self.size == 1:
            return dict(tensors or {})
        forms = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in (tensors or {}).items()]
        shared = {}
        for name, dtype, shape in self.broadcast_object(forms, purpose, source):
            own = torch.empty(shape, dtype=getattr(torch, dtype)) if tensors is None else tensors[name].detach()
            shared[name] = self.broadcast(source, own, purpose).cpu()
        return shared

    def broadcast(self, source: int, tensor: Tensor, purpose: str) -> Tensor:
        """Return the tensor of one process; the others give any of its shape and kind to write to."""
        if self.size == 1:
            return tensor
        placed = tensor.to(self.device).contiguous()
        with self._sending(purpose, placed if self.rank == source else None):
            dist.broadcast(placed, source)
            return placed.to(tensor.device)

    def barrier(self, purpose: str) -> None:
        """Return when all processes have come here."""
        int(self.all_reduce(torch.zeros(1, dtype=torch.int32), purpose))

    @contextmanager
    def raise_on_any_rank(self) -> Iterator[None]:
        """End all processes when one of them meets a user's error in the block.

        Raises:
            UserError: met by this process.
            RefusedElsewhere: met by another one.
        """
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        failed = self.all_gather_object(error is not None, "agreement")
        if error is not None:
            raise error
        if any(failed):
            # Not before it has spoken: a launcher stops the others as soon as one process ends.
            with suppress(ProcessLostError):
                self.barrier("agreement")
            raise RefusedElsewhere(2)

    @contextmanager
    def _sending(self, purpose: str, tensor: Tensor | None) -> Iterator[None]:
        if tensor is not None:
            self.sent[purpose] += tensor.numel() * tensor.element_size()
        try:
            yield
        except RuntimeError as error:
            if not _is_loss(error):
                raise
            raise ProcessLostError(
                f"process {self.rank} of {self.size} cannot reach the others any more (while it exchanged: {purpose}); "
                "the first error is in the output of the one that ended. The last checkpoint is untouched: go on with "
                "the same command and `--resume_from_checkpoint latest`"
            ) from error


def _is_loss(error: RuntimeError) -> bool:
    """Say whether an error in a collective comes from the connection to other processes, not from this one's device.

    NCCL's have classes of their own; gloo raises plain ones that name its source file.
    """
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
