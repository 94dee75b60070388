"""Calls of compiled kernels as one: the same arguments, on the same memory, without Python between them.

    team of threads    call 1 ── all are done ── call 2 ── all are done ── ...

A kernel of a decode step computes for 5 to 500 us; to check, allocate and call takes Python 35 us for each, with caches
that a product has emptied, and to wake a team of threads some 5.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from chorus.kernels.native.numbers import pointer
from chorus.kernels.native.team import BARRIER, EDITION, Compiled, team_size

Call = tuple[int, "array[int]"]
"""Where a kernel's code is, and its arguments (`team`)."""


class Program:
    """The calls in their order. What their arguments are addresses of must outlive it."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._arguments = [arguments for _, arguments in calls]
        for arguments in self._arguments:
            arguments[0] = 0  # the ticket
        self._table = torch.tensor([(code, arguments.buffer_info()[0]) for code, arguments in calls])

    def __call__(self) -> None:
        """On as many threads as torch has here, without the interpreter's lock."""
        barrier = BARRIER if team_size() > 1 else 0
        _kernel().run_unlocked(len(self._arguments), self._table.data_ptr(), barrier)


def prepare() -> None:
    """Compiles now what the first call would wait for."""
    _kernel()


@cache
def _kernel() -> Compiled:
    edition = EDITION

    def program(arguments):
        a = carray(arguments, (5,))
        count, table_at, barrier = a[2], a[3], a[4]
        table = carray(pointer(table_at), (count, 2), np.int64)
        for i in range(count if edition == a[1] else 0):
            _call(table[i, 0], table[i, 1])
            if barrier:
                _wait(barrier)
            carray(pointer(table[i, 1]), (1,), np.int64)[0] = 0  # each thread says so: nobody looks until the next run

    return Compiled(program)


@intrinsic
def _call(typing: Any, code: Any, arguments: Any) -> Any:
    """Calls the kernel at an address."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        words = ir.IntType(64).as_pointer()
        kernel = ir.FunctionType(ir.VoidType(), [words]).as_pointer()
        builder.call(builder.inttoptr(values[0], kernel), [builder.inttoptr(values[1], words)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def _wait(typing: Any, barrier: Any) -> Any:
    """Calls the function of no arguments at an address."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.call(builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), build
