"""How a kernel is compiled and kept, and run on the OpenMP threads that torch computes with.

A team of threads of our own would fight with torch's for the cores: OpenMP's threads watch for work between two
operators. So a kernel is handed to the very function that torch's own parallel regions call.

    arguments, int64:  ticket, edition, then addresses, sizes, bits of float32     the same memory for all threads
"""

import ctypes
import logging
import struct
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
import torch
from numba import types

from chorus.kernels.native.numbers import OPTIONS

logger = logging.getLogger(__name__)

Kernel = Callable[[Any], None]

_SHARED = (
    *(
        "numbers.py",
        "vectors.py",
        "amx_tile.py",
        "dot_tile.py",
        "fma_tile.py",
        "head_tile.py",
        "page_tiles.py",
        "rank_tiles.py",
    ),
    *("gate.py", "packed_linear.py", "../types.py"),
)
EDITION = int.from_bytes(
    sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in _SHARED)).digest()[:7], "big"
)
"""What a kernel compares its arguments' edition with, which makes it part of the key under which compiled code is kept:
numba itself looks only at the file that a kernel is in, and would go on with what it shares as that was before."""

_FLOAT, _BITS = struct.Struct("f"), struct.Struct("i")

# Keeps the interpreter's lock, where a kernel is shorter than handing it on.
_ON_THREAD = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_ON_THREAD_UNLOCKED = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Compiled:
    """A kernel's machine code. Call it with integers, None for an address that is not there, floats and tensors."""

    def __init__(self, function: Kernel) -> None:
        signature = types.void(types.CPointer(types.int64))
        try:
            self._code = numba.cfunc(signature, cache=True, **OPTIONS)(_named_for_its_file(function))
        except (RuntimeError, OSError) as error:  # no folder that can be written
            logger.warning("compiled kernels can not be kept, every start compiles them anew: %s", error)
            self._code = numba.cfunc(signature, **OPTIONS)(function)
        self._on_thread = _ON_THREAD(self._code.address)
        self._on_thread_unlocked = _ON_THREAD_UNLOCKED(self._code.address)

    def __call__(self, items: int, *arguments: torch.Tensor | int | float | None, is_long: bool = False) -> None:
        """Runs it on as many threads as torch has here, at most `items`. What tensors hold must outlive the call.

        If it `is_long` other threads have the interpreter meanwhile.
        """
        memory = array("q", [0, EDITION, *[a if type(a) is int else _word(a) for a in arguments]])
        address, _ = memory.buffer_info()
        if _listener.note is not None:
            _listener.note(self._code.address, memory)
        threads = min(torch.get_num_threads(), items) if items > 1 and _parallel is not None else 1
        if threads > 1:
            (_parallel_unlocked if is_long else _parallel)(self._code.address, address, threads, 0)
        else:
            (self._on_thread_unlocked if is_long else self._on_thread)(address)

    def run_unlocked(self, *arguments: int) -> None:
        """Runs it on all threads that torch has here and lets other threads have the interpreter meanwhile."""
        memory = array("q", [0, EDITION, *arguments])
        address, _ = memory.buffer_info()
        if (threads := team_size()) > 1:
            _parallel_unlocked(self._code.address, address, threads, 0)
        else:
            self._on_thread_unlocked(address)


def team_size() -> int:
    """How many threads `run_unlocked` takes."""
    return torch.get_num_threads() if _parallel is not None and BARRIER else 1


class _Listener(threading.local):
    note: Callable[[int, "array[int]"], None] | None = None


_listener = _Listener()


@contextmanager
def told_of_calls(note: Callable[[int, "array[int]"], None]) -> Iterator[None]:
    """Tells of each call of a kernel on this thread: where its code is, and its arguments, whose ticket is used up."""
    _listener.note = note
    try:
        yield
    finally:
        _listener.note = None


def _named_for_its_file(function: Any) -> Kernel:
    """The kernel under a name, and so with a file for its code, that only the same source and constants have.

    numba numbers the code of all kernels of one name in one index. Of two processes that add to it at the same time one
    may overwrite the other's code under a number that both have taken, and is then given for what it is not.
    """
    constants = [cell.cell_contents for cell in function.__closure__ or ()]
    source = Path(function.__code__.co_filename).read_bytes()
    digest = sha256(repr((numba.__version__, constants)).encode() + source).hexdigest()
    function.__qualname__ = f"{function.__name__}.{digest[:16]}"
    named: Kernel = function
    return named


def _word(argument: torch.Tensor | int | float | None) -> int:
    if argument is None:
        return 0
    if type(argument) is float:  # isinstance takes twice as long
        bits: int = _BITS.unpack(_FLOAT.pack(argument))[0]
        return bits
    return argument.data_ptr()  # type: ignore[union-attr]


def _find_parallel(library: ctypes.CDLL) -> Any:
    """OpenMP's `GOMP_parallel(function, data, threads, flags)`, as torch is linked with it; None where it has none."""
    function = getattr(library, "GOMP_parallel", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
    return function


_parallel, _parallel_unlocked = _find_parallel(ctypes.PyDLL(None)), _find_parallel(ctypes.CDLL(None))
_barrier = getattr(ctypes.CDLL(None), "GOMP_barrier", None)
BARRIER = 0 if _barrier is None else ctypes.cast(_barrier, ctypes.c_void_p).value or 0
"""Where the function is that returns once all threads of a team have called it; 0 where there are no teams."""
