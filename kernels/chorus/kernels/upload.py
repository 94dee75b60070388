"""From the host to the device without waiting: pageable memory would make the copy wait for the device.

The allocator keeps a pinned block until its copies are done.
"""

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`; the host's own tensor on a CPU."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def write(buffer: Tensor, host: Tensor) -> None:
    """Writes over a device's buffer, on the current stream."""
    buffer.copy_(host.pin_memory() if buffer.is_cuda else host, non_blocking=True)
