"""Who computes: a compiled kernel, Triton or torch. The one place that decides it for plans and operators.

on CUDA, or asked to       in TRITON_DTYPES          a Triton kernel
                           in other dtypes           the specification (`reference`)
on a CPU                   in NATIVE_DTYPES          a compiled kernel (`native`), where there is one, else torch
                           in other dtypes           torch, or the specification (low_rank, attention)
elsewhere                                            the specification

A norm or a gated product in float32 is torch's own on a CPU: no rounding at its end hides the order of its sums or its
exponential, and models keep transformers' numbers to the bit.

Neither Triton nor numba, which compiles for a CPU, is everywhere: what needs them is imported where it runs.
"""

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NATIVE_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
ROUNDED = NATIVE_DTYPES - {torch.float32}


def runs_native(tensor: Tensor, *, rounds: bool = False) -> bool:
    """Whether a compiled kernel runs on such tensors; `rounds` asks for dtypes whose rounding hides orders of sums.

    Asked before anything else: between two products that have emptied the caches a look at `device.type` takes 20 us.
    """
    return tensor.is_cpu and tensor.dtype in (ROUNDED if rounds else NATIVE_DTYPES)


def runs_triton(device: torch.device, asked: bool | None = None) -> bool:
    """Whether Triton runs: as asked, on CPU tensors only in its interpreter; on CUDA unless told."""
    return device.type == "cuda" if asked is None else asked
