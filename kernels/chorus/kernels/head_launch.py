"""Launches `head`: up to three launches of one kernel, in one custom op. No argument is checked here.

CHORUS_KERNELS_DEBUG=1 compiles the kernel with its assertions: tiles within the batch, weights within the pool.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from chorus.kernels import triton_head as kernels
from chorus.kernels.head_tables import TILE_FIELDS, HeadGeometry
from chorus.kernels.low_rank_launch import launch_options
from chorus.kernels.pointwise_tuning import HEAD_ROWS, head_tile


@torch.library.custom_op("chorus::head", mutates_args=())
def head_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dense_weight: Tensor | None,
    dense_bias: Tensor | None,
    tables: Tensor,
    geometry: Sequence[int],
    width: int,
    activation: str,
) -> Tensor:
    """`reference.head` of a batch's `HeadTables`."""
    how = HeadGeometry(*geometry)
    logits = x.new_zeros(x.shape[0], width)
    after, direct = tables[how.dense * TILE_FIELDS :], tables[(how.dense + how.after_dense) * TILE_FIELDS :]
    with torch.cuda.device_of(x):
        if dense_weight is not None and dense_bias is not None and how.dense:
            states = torch.empty_like(x, memory_format=torch.contiguous_format)
            hidden = x.shape[1]
            _linear(
                states, x, dense_weight.view(-1, hidden), dense_bias.view(-1), tables, how.dense, hidden, activation
            )
            _linear(logits, states, weight, bias, after, how.after_dense, 0, "")
        if how.direct and width:
            _linear(logits, x, weight, bias, direct, how.direct, 0, "")
    return logits


@head_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dense_weight: Tensor | None,
    dense_bias: Tensor | None,
    tables: Tensor,
    geometry: Sequence[int],
    width: int,
    activation: str,
) -> Tensor:
    return x.new_empty(x.shape[0], width)


def _linear(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, tiles: Tensor, count: int, layer_rows: int, activation: str
) -> None:
    tile = head_tile(x.dtype, x.shape[1], dense=layer_rows > 0)
    kernels.segment_linear[(count, -(-out.shape[1] // tile.block_n))](
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        out_ptr=out,
        tiles_ptr=tiles,
        x_rows=x.shape[0],
        weight_rows=weight.shape[0],
        layer_rows=layer_rows,
        K=x.shape[1],
        x_stride=x.stride(0),
        out_stride=out.stride(0),
        ACTIVATION=activation,
        BLOCK_M=HEAD_ROWS,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **launch_options(tile.warps, tile.stages),
    )
