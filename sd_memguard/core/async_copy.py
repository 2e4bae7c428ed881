"""Reading a tensor of the device on the host without stopping the host from queueing more work for the device."""

import torch
from torch import Tensor


class AsyncCPUCopy:
    """A tensor on its way to the host.

    On CUDA the copy goes to pinned memory behind what is queued so far, and ``wait`` waits for it alone; the device
    goes on with what was queued later. On the CPU the tensor is there at once; other devices copy and wait here.

    Args:
        tensor: (any shape), not to be changed any more.
    """

    def __init__(self, tensor: Tensor) -> None:
        # torch makes the target of a non-blocking copy from CUDA pinned memory; elsewhere it may be read too early.
        self._copy = tensor.detach().to("cpu", non_blocking=tensor.is_cuda)
        self._arrived = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def wait(self) -> Tensor:
        """Return the tensor on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device; to CUDA through pinned memory, so that the host does not wait for the queue."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
