"""From the device to the host, beside whatever the device is given meanwhile."""

from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Readback(Generic[T]):
    """A device's numbers on their way to the host, from the moment that the device has them: a list of T."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # Into pageable memory the copy would wait for the device.
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[T]:
        """Waits for them, and for nothing that the device was given later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[T] = self._host.tolist()
        return values
