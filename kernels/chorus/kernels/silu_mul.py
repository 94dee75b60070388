"""`silu_mul` and `gelu_tanh_mul`: what a gated feed-forward computes between its linears, act(gate) * up.

gate and up [T, N] may be the two halves of one product's columns: their rows need only be contiguous. What the
activation gives is rounded before it is multiplied, as transformers does it.
"""

import torch
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.dispatch import TRITON_DTYPES, runs_native, runs_triton
from chorus.kernels.row_ops import check_strides


def silu_mul(gate: Tensor, up: Tensor, *, triton: bool | None = None) -> Tensor:
    """silu(gate) * up, a new tensor [T, N]. `triton` says whether Triton runs (on CUDA if None).

    Raises:
        ValueError: gate and up differ in shape, dtype or device, or, for a kernel, their rows are not contiguous.
    """
    return gated_mul(gate, up, "silu", triton=triton)


def gelu_tanh_mul(gate: Tensor, up: Tensor, *, triton: bool | None = None) -> Tensor:
    """gelu(gate) * up with the tanh approximation of gelu, as Gemma has it; otherwise as `silu_mul`."""
    return gated_mul(gate, up, "gelu_tanh", triton=triton)


def gated_mul(gate: Tensor, up: Tensor, activation: reference.GatedActivation, *, triton: bool | None = None) -> Tensor:
    """Either of them."""
    if gate.dim() != 2 or gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(f"gate, up: want one shape [T, N], got {_said(gate)} and {_said(up)}")
    if not triton and runs_native(gate, rounds=True):
        from chorus.kernels.native import gated_mul as native  # numba is not everywhere

        check_strides("gate", gate)
        check_strides("up", up)
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        native.gated_mul(out, gate, up, activation)
        return out
    if gate.dtype not in TRITON_DTYPES or not runs_triton(gate.device, triton):
        return reference.gated_mul(gate, up, activation)
    from chorus.kernels.pointwise_launch import gated_mul_op  # Triton is not everywhere

    check_strides("gate", gate)
    check_strides("up", up)
    launched: Tensor = gated_mul_op(gate, up, activation)
    return launched


def _said(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
