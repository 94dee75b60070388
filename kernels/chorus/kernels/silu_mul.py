"""`silu_mul` and `gelu_tanh_mul`: what a gated feed-forward computes between its linears, act(gate) * up.

gate and up [T, N] may be the two halves of one product's columns: their rows need only be contiguous. What the
activation gives is rounded before it is multiplied, as transformers does it.
"""

import torch.nn.functional as F
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.dispatch import TRITON_DTYPES, runs_triton
from chorus.kernels.row_ops import check_rows


def silu_mul(gate: Tensor, up: Tensor, *, triton: bool | None = None) -> Tensor:
    """silu(gate) * up, a new tensor [T, N]. `triton` says whether Triton runs (on CUDA if None).

    Raises:
        ValueError: gate and up differ in shape, dtype or device, or, for Triton, their rows are not contiguous.
    """
    if _runs_triton(gate, up, triton):
        return _on_triton(gate, up, "silu")
    return F.silu(gate).mul_(up)


def gelu_tanh_mul(gate: Tensor, up: Tensor, *, triton: bool | None = None) -> Tensor:
    """gelu(gate) * up with the tanh approximation of gelu, as Gemma has it; otherwise as `silu_mul`."""
    if _runs_triton(gate, up, triton):
        return _on_triton(gate, up, "gelu_tanh")
    return F.gelu(gate, approximate="tanh").mul_(up)


def _on_triton(gate: Tensor, up: Tensor, activation: reference.GatedActivation) -> Tensor:
    if gate.dtype not in TRITON_DTYPES:
        return reference.gated_mul(gate, up, activation)
    from chorus.kernels.pointwise_launch import gated_mul_op  # Triton is not everywhere

    check_rows("gate", gate, gate.device)
    check_rows("up", up, gate.device)
    out: Tensor = gated_mul_op(gate, up, activation)
    return out


def _runs_triton(gate: Tensor, up: Tensor, triton: bool | None) -> bool:
    if gate.dim() != 2 or gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(f"gate, up: want one shape [T, N], got {_said(gate)} and {_said(up)}")
    return runs_triton(gate.device, triton)


def _said(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
