"""The backward of `low_rank`, an autograd.Function that keeps x and s alone.

With s = c * (x A^T), y' = y + s B and G the gradient of y':

    dS = c * (G B^T)     dX = dS A     dA = dS^T x     dB = s^T G     dY = G

dS and dX are `low_rank` itself with A and B in each other's place. dA and dB sum over a segment's rows in their order,
by one program a tile: no atomics, equal inputs give equal bits. mid_scale is taken as a constant.

The specification's autograd is the oracle. Where Triton runs it computes all of this; elsewhere torch does, a segment
after the other: training batches hold few, long ones.
"""

from typing import Any

import torch
from torch import Tensor

from chorus.kernels.low_rank_tables import LowRankTables
from chorus.kernels.types import LowRankSegment, RankPool


class LowRankFunction(torch.autograd.Function):
    """`apply(y, x, a, b, mid_scale, segments, tables)`; y is changed in place. Tables where Triton is to run."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, mid_scale: Tensor,
        segments: tuple[LowRankSegment, ...], tables: LowRankTables | None,
    ) -> Tensor:  # fmt: skip
        s = _add(y, x, RankPool(a, b, mid_scale), segments, tables)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, s, a, b, mid_scale)
        ctx.segments, ctx.tables = segments, tables
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, s, a, b, mid_scale = ctx.saved_tensors
        of_y = gradients[0].contiguous()
        of_x = torch.zeros_like(x)
        of_s = _add(of_x, of_y, RankPool(b, a, mid_scale), ctx.segments, ctx.tables)
        of_a = _weight_gradient(of_s, x, a.shape[0], ctx.segments, ctx.tables) if ctx.needs_input_grad[2] else None
        of_b = _weight_gradient(s, of_y, b.shape[0], ctx.segments, ctx.tables) if ctx.needs_input_grad[3] else None
        return gradients[0], of_x, of_a, of_b, None, None, None


def _add(
    y: Tensor, x: Tensor, pool: RankPool, segments: tuple[LowRankSegment, ...], tables: LowRankTables | None
) -> Tensor:
    """y += s B in place; returns s [T, columns], whose lanes past a segment's rank are 0."""
    if tables is not None:
        from chorus.kernels.low_rank_launch import low_rank_keeping_s_op

        kept: Tensor = low_rank_keeping_s_op(y, x, *pool, tables.buffer, tables.flat_geometry)
        return kept
    s = x.new_zeros(x.shape[0], max((len(segment.pool_rows) for segment in segments), default=0))
    for segment in segments:
        rows, index = slice(segment.start, segment.end), torch.tensor(segment.pool_rows, device=x.device)
        own = (x[rows] @ pool.a[index].T).mul_(pool.mid_scale[index].to(x.dtype))
        s[rows, : len(segment.pool_rows)] = own
        y[rows].addmm_(own, pool.b[index])
    return s


def _weight_gradient(
    s: Tensor, x: Tensor, pool_rows: int, segments: tuple[LowRankSegment, ...], tables: LowRankTables | None
) -> Tensor:
    """s^T x of each segment at its pool rows, [pool_rows, K]."""
    if tables is not None:
        from chorus.kernels.low_rank_launch import weight_gradient_op

        block, tiles = tables.gradient_tiles()
        computed: Tensor = weight_gradient_op(s, x, tables.buffer, tables.geometry.pages_at, tiles, block, pool_rows)
        return computed
    out = x.new_zeros(pool_rows, x.shape[1])
    for segment in segments:
        rows, index = slice(segment.start, segment.end), torch.tensor(segment.pool_rows, device=x.device)
        out[index] += s[rows, : len(segment.pool_rows)].T @ x[rows]
    return out
