"""Who computes: Triton or torch. The one place that decides it for plans and operators.

on CUDA, or asked to       in TRITON_DTYPES          a Triton kernel
                           in other dtypes           the specification (`reference`)
on a CPU                                             vectorised torch
elsewhere                                            the specification
"""

import torch

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def runs_triton(device: torch.device, asked: bool | None = None) -> bool:
    """Whether Triton runs: as asked, on CPU tensors only in its interpreter; on CUDA unless told."""
    return device.type == "cuda" if asked is None else asked
