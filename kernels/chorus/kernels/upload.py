"""From the host to the device without waiting: pageable memory would make the copy wait for the device."""

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`; the host's own tensor on a CPU."""
    return _pinned(host, device).to(device, non_blocking=True)


def write(buffer: Tensor, host: Tensor) -> None:
    """Writes over a device's buffer, on the current stream."""
    buffer.copy_(_pinned(host, buffer.device), non_blocking=True)


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    """The allocator keeps a pinned block until its copies are done."""
    return host.pin_memory() if device.type == "cuda" else host
