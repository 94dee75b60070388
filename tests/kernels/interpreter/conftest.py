"""Tests that run Triton kernels on the CPU. Triton decides at import whether it interprets, so they have a process of
their own, which `tests/kernels/test_interpreter.py` starts; elsewhere nothing is collected here.

The interpreter keeps bfloat16 as uint16, and multiplies and rounds those integers: its dot errs by 1e10, its rounding
cuts off. Both are put right here. Arithmetic on bfloat16 elsewhere stays wrong: kernels turn it into float32 first.

It also puts its own functions in the place of the language's for each call of a function, a millisecond each time and
a quarter of all. Here they stay.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def bf16_to_float(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rounded to nearest even, as torch does it."""
    rounded = torch.from_numpy(np.ascontiguousarray(value)).bfloat16()
    return rounded.view(torch.uint16).numpy().reshape(value.shape)


if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def upcast(handle: Any) -> Any:
        is_bf16 = handle.dtype.scalar == tl.bfloat16
        return TensorHandle(bf16_to_float(handle.data), tl.float32) if is_bf16 else handle

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return plain_dot(self, upcast(a), upcast(b), d, *rest)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(float_to_bf16(source.data), target.scalar)
        return plain_cast(self, source, target)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast

    plain_patch = interpreter._patch_lang
    patched: set[int] = set()

    class Kept:
        """Stands for what would be undone after a call."""

        def restore(self) -> None:
            pass

    def patch_once(function: Any) -> Kept:
        """For all functions of a module: they see the same languages."""
        if id(function.__globals__) not in patched:
            plain_patch(function)
            patched.add(id(function.__globals__))
        return Kept()

    interpreter._patch_lang = patch_once


@pytest.fixture(autouse=True)
def poisoned_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody wrote is NaN."""
    from chorus.kernels import low_rank_launch

    plain = low_rank_launch.new_workspace

    def poisoned(splits: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        return plain(splits, rows, columns, device).fill_(float("nan"))

    monkeypatch.setattr(low_rank_launch, "new_workspace", poisoned)
