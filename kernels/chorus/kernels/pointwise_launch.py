"""Launches the kernels between a layer's linears, as custom ops that torch.compile and CUDA graphs take as they are.

No argument is checked here, and nothing waits for the device.
"""

import torch
from torch import Tensor

from chorus.kernels import triton_pointwise as kernels
from chorus.kernels.low_rank_launch import launch_options
from chorus.kernels.pointwise_tuning import GATED, norm_tile


@torch.library.custom_op("chorus::residual_norm", mutates_args=("residual",))
def residual_norm_op(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    biases: Tensor | None,
    table: Tensor | None,
    slots_at: int,
    kind: str,
    eps: float,
) -> Tensor:
    """`reference.residual_norm`; `table[slots_at + t]` is row t's slot of the pooled `weights`, if there are any."""
    rows, width = residual.shape
    out = residual.new_empty(rows, width)
    if not rows:  # a step from which nothing is told; CUDA knows no empty grid
        return out
    tile = norm_tile(width)
    with torch.cuda.device_of(residual):
        kernels.residual_norm[(rows,)](
            residual_ptr=residual,
            x_ptr=residual if x is None else x,
            out_ptr=out,
            weight_ptr=weight,
            bias_ptr=weight if bias is None else bias,
            weights_ptr=weight if weights is None else weights,
            biases_ptr=weight if biases is None else biases,
            table_ptr=table,
            slots_at=slots_at,
            slots_total=0 if weights is None else weights.shape[0],
            residual_stride=residual.stride(0),
            x_stride=0 if x is None else x.stride(0),
            N=width,
            eps=eps,
            KIND=kind,
            HAS_X=x is not None,
            HAS_BIAS=bias is not None,
            HAS_POOL=weights is not None and table is not None,
            BLOCK_N=tile.columns,
            **launch_options(tile.warps, 1),
        )
    return out


@residual_norm_op.register_fake
def _(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    biases: Tensor | None,
    table: Tensor | None,
    slots_at: int,
    kind: str,
    eps: float,
) -> Tensor:
    return residual.new_empty(residual.shape)


@torch.library.custom_op("chorus::gated_mul", mutates_args=())
def gated_mul_op(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """[T, N], act(gate) * up; `activation` is "silu" or "gelu_tanh"."""
    rows, width = gate.shape
    out = gate.new_empty(rows, width)
    with torch.cuda.device_of(gate):
        kernels.gated_mul[(rows, -(-width // GATED.columns))](
            gate_ptr=gate,
            up_ptr=up,
            out_ptr=out,
            gate_stride=gate.stride(0),
            up_stride=up.stride(0),
            N=width,
            ACTIVATION=activation,
            BLOCK_N=GATED.columns,
            **launch_options(GATED.warps, 1),
        )
    return out


@gated_mul_op.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)
