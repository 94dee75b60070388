"""Host memory of adapters: mapped from the system for each, and copied into in few calls.

Mapped, because the system has it back when the last tensor is gone. What threads of their own free stays in malloc's
arenas, in holes: 16 adapters of 6.7 MB, loaded one after the other, left 92 MB there.

In few calls, because a loader thread lets go of the interpreter's lock in every call of torch, and then waits for it
behind the step thread, whose every operator wakes it in vain: a load that copied 56 tensors one after the other took 18
ms, and made four steps of 4.3 ms ones of 6.9.
"""

import mmap
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

_ALIGNED = 64


def mapped(size: int) -> mmap.mmap:
    """At least one byte of memory of its own, all zero. Tensors made of it (`torch.frombuffer`) keep it."""
    return mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Contiguous tensors of one shape as one; without a copy where they lie one after the other, as `copies` lays them.

    Then it is theirs, not to be written to. At least one tensor, none without elements.
    """
    first, last = tensors[0], tensors[-1]
    begin, size = first.data_ptr(), first.nbytes
    in_line = [tensor.data_ptr() for tensor in tensors] == list(range(begin, begin + len(tensors) * size, size))
    if not in_line or first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
        return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def copies(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Contiguous copies in the same order, in `dtype` if one is given; all of them share one mapping.

    No tensor may be without elements.
    """
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        alike[tensor.shape, dtype or tensor.dtype].append(i)
    sizes = [len(places) * shape.numel() * held_as.itemsize for (shape, held_as), places in alike.items()]
    *begins, total = accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0)
    memory = mapped(total)
    copied = list(tensors)
    for begin, ((shape, held_as), places) in zip(begins, alike.items(), strict=True):
        count = len(places) * shape.numel()
        block = torch.frombuffer(memory, dtype=held_as, count=count, offset=begin).view(len(places), *shape)
        torch.stack([tensors[i] for i in places], out=block)
        for i, copy in zip(places, block.unbind(), strict=True):
            copied[i] = copy
    return copied
