"""Host memory of adapters: mapped from the system for each, and copied into in few calls.

Mapped, because the system has it back when the last tensor is gone. What threads of their own free stays in malloc's
arenas, in holes: 16 adapters of 6.7 MB, loaded one after the other, left 92 MB there.

In few calls, because a loader thread lets go of the interpreter's lock in every call of torch, and then waits for it
behind the step thread, whose every operator wakes it in vain: a load that copied 56 tensors one after the other took 18
ms, and made four steps of 4.3 ms ones of 6.9.
"""

import mmap
from collections import defaultdict
from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from chorus.adapters.lowered import Stack

_ALIGNED = 64


def mapped(size: int) -> mmap.mmap:
    """At least one byte of memory of its own, all zero. Tensors made of it (`torch.frombuffer`) keep it."""
    return mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def stacks(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Stack, ...]:
    """Copies in `dtype`, those of one shape together; all of them share one mapping. No tensor without elements."""
    alike: dict[torch.Size, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        alike[tensor.shape].append(name)
    sizes = [len(names) * shape.numel() * dtype.itemsize for shape, names in alike.items()]
    *begins, total = accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0)
    memory = mapped(total)
    made = []
    for begin, (shape, names) in zip(begins, alike.items(), strict=True):
        count = len(names) * shape.numel()
        block = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(len(names), *shape)
        torch.stack([tensors[name] for name in names], out=block)
        made.append(Stack(tuple(names), block))
    return tuple(made)
