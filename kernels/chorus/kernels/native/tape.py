"""What a computation on a CPU asks for, recorded once and asked for again: same memory, same work, no Python between.

    recorded   embedding | norm  qkv  rotate  attend  o  norm  ...  | softmax | ..
    replayed   torch     |               a program                  | torch   | ..

Compiled kernels that follow each other become a `Program`. torch's operators between them run again and write where
their results were. What was only an allocation or a view needs nothing. So whatever Python decided is fixed, and all
that differs between replays has to lie in memory that is written before them, as with a CUDA graph.

Results live in memory that is used again as soon as the recorded computation had dropped them, and which all tapes of
one `Tapes` share: one is replayed at a time, and what it gives is good until the next.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from chorus.kernels.native.program import Call, Program
from chorus.kernels.native.team import told_of_calls

_ALLOCATIONS = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
    }
)
_CASTS = frozenset({torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default})
_MADE_OF_NUMBERS = frozenset({torch.ops.aten.lift_fresh.default, torch.ops.aten.detach_.default})  # by torch.tensor
_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_LINE = 64  # bytes that a cache has at a time


class Tapes:
    """Gives what does the same work again, on the same memory: `engine.graphs.Record` for a CPU."""

    def __init__(self) -> None:
        self.memory = Memory()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Computes `run` once.

        Raises:
            RuntimeError: it reads a tensor's numbers.
        """
        recording = _Recording(self.memory)
        with told_of_calls(recording.note), recording:
            out = run()
        return _Replay(recording.parts(), self.memory.unowned(out), (self.memory, *recording.constants))


@dataclass(frozen=True, slots=True)
class _Replay:
    parts: list[Callable[[], object]]
    out: Tensor
    kept: tuple[object, ...]
    """What else has to outlive it."""

    def __call__(self) -> Tensor:
        for part in self.parts:
            part()
        return self.out


class Memory:
    """Blocks of powers of two of bytes, each free again when the last tensor on it is gone."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._blocks: dict[int, np.ndarray] = {}  # by address
        self.held = 0
        """Bytes of all blocks."""

    def empty(self, like: Tensor) -> Tensor:
        """A tensor of the shape, strides and dtype of another, on a block."""
        span = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        if not span:
            return torch.empty_like(like)
        size = _LINE
        while size < span * like.itemsize:
            size *= 2
        free = self._free.setdefault(size, [])
        block = free.pop() if free else self._new(size)
        used = block[: span * like.itemsize]
        weakref.finalize(used, free.append, block).atexit = False
        return torch.frombuffer(used, dtype=like.dtype).as_strided(like.shape, like.stride())

    def unowned(self, tensor: Tensor) -> Tensor:
        """The same numbers as a tensor that keeps no block from being free; a tensor of other memory itself."""
        block = self._blocks.get(_storage(tensor) or 0)
        if block is None:
            return tensor
        numbers = torch.frombuffer(block, dtype=tensor.dtype)
        return numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _new(self, size: int) -> np.ndarray:
        memory = np.empty(size + _LINE, np.uint8)
        self.held += len(memory)
        begin = -memory.ctypes.data % _LINE
        block = memory[begin : begin + size]
        self._blocks[block.ctypes.data] = block
        return block


class _Recording(TorchDispatchMode):
    def __init__(self, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory
        self._steps: list[Call | Callable[[], object]] = []
        self.constants: list[Tensor] = []

    def note(self, *call: Any) -> None:
        self._steps.append(call)

    def parts(self) -> list[Callable[[], object]]:
        """What to call, in order."""
        parts: list[Callable[[], object]] = []
        for is_kernel, group in groupby(self._steps, key=lambda step: isinstance(step, tuple)):
            steps: list[Any] = list(group)
            parts += [Program(steps)] if is_kernel else steps
        return parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in func.tags for tag in _READS) and not _is_lookup(func, args):
            raise RuntimeError(f"{func} reads a tensor's numbers")
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            return self._memory.empty(out)
        if func in _MADE_OF_NUMBERS:
            self.constants.append(out)  # kernels may have its address
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = tree_leaves(out)
        if not all(isinstance(result, Tensor) for result in results):
            raise RuntimeError(f"{func} reads a tensor's numbers")
        changes = func._schema.is_mutable
        if not changes and {_storage(result) for result in results} <= {_storage(tensor) for tensor in given}:
            return out  # views
        unowned = self._unowned
        if changes:
            self._steps.append(partial(func, *unowned(args), **unowned(kwargs or {})))
            return out
        kept = tree_map(lambda new: self._memory.empty(new).copy_(new), out)
        self._steps.append(_again(func, unowned(args), unowned(kwargs or {}), unowned(kept)))
        return kept

    def _unowned(self, tree: Any) -> Any:
        return tree_map(lambda leaf: self._memory.unowned(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _again(func: Any, args: Any, kwargs: Any, kept: Any) -> Callable[[], object]:
    """The same call with its results in `kept`, mostly without a copy."""
    if func in _CASTS:
        return partial(kept.copy_, args[0])
    if isinstance(kept, Tensor) and (variant := _out_variant(func)) is not None:
        operator, name = variant
        return partial(operator, *args, **kwargs, **{name: kept})
    return partial(_compute_again, partial(func, *args, **kwargs), tree_leaves(kept))


@cache
def _out_variant(func: Any) -> tuple[Any, str] | None:
    """The overload with one argument more, which the result is written to, and that argument's name.

    None for composites: `linear.out` adds a bias in a pass of its own, and so rounds once more than `linear`.
    """
    if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return None
    packet, taken = func.overloadpacket, [(a.name, str(a.type)) for a in func._schema.arguments]
    for name in packet.overloads():
        arguments = getattr(packet, name)._schema.arguments
        written = [a.name for a in arguments if a.is_out]
        if len(written) == 1 and [(a.name, str(a.type)) for a in arguments if not a.is_out] == taken:
            return getattr(packet, name), written[0]
    return None


def _compute_again(ask: Callable[[], object], kept: Sequence[Tensor]) -> None:
    for tensor, result in zip(kept, tree_leaves(ask()), strict=True):
        tensor.copy_(result)


def _is_lookup(func: Any, args: Any) -> bool:
    """Whether it indexes with numbers; what it gives with a mask depends on the mask's."""
    return func is torch.ops.aten.index.Tensor and all(i is None or i.dtype == torch.int64 for i in args[1])


def _storage(tensor: Tensor) -> int | None:
    """Where its memory begins; None of a weight that oneDNN has packed."""
    return None if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()
