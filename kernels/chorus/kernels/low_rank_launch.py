"""Launches the kernels of `low_rank` over a batch's tables: two launches a family. A custom op, so that torch.compile
and CUDA graphs see one call that changes y.

CHORUS_KERNELS_DEBUG=1 compiles the kernels with their assertions: pages within the pool, tiles within the batch.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chorus.kernels import triton_low_rank as kernels
from chorus.kernels.low_rank_tables import Geometry, TileGroup
from chorus.kernels.tuning import Family, LowRankTiles, arch_of, block_rows, gradient_rule, low_rank_tiles


@torch.library.custom_op("chorus::low_rank", mutates_args=("y",))
def low_rank_op(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, mid_scale: Tensor, tables: Tensor, geometry: Sequence[int]
) -> None:
    """`low_rank` of x [T, K] onto y [T, N] for a batch's `LowRankTables`. Its arguments are not checked."""
    _add(y, x, a, b, mid_scale, tables, Geometry.of(geometry), new_workspace)


@low_rank_op.register_fake
def _(y: Tensor, x: Tensor, a: Tensor, b: Tensor, mid_scale: Tensor, tables: Tensor, geometry: Sequence[int]) -> None:
    return None


@torch.library.custom_op("chorus::low_rank_keeping_s", mutates_args=("y",))
def low_rank_keeping_s_op(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, mid_scale: Tensor, tables: Tensor, geometry: Sequence[int]
) -> Tensor:
    """The same, and s [T, columns] float32, 0 where a row has no such rank lane: what the backward needs."""
    return _add(y, x, a, b, mid_scale, tables, Geometry.of(geometry), _zero_workspace).sum(0)


@low_rank_keeping_s_op.register_fake
def _(y: Tensor, x: Tensor, a: Tensor, b: Tensor, mid_scale: Tensor, tables: Tensor, geometry: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], geometry[0], dtype=torch.float32)


@torch.library.custom_op("chorus::low_rank_weight_gradient", mutates_args=())
def weight_gradient_op(
    s: Tensor, x: Tensor, tables: Tensor, pages_at: int, tiles: Tensor, block_rank: int, pool_rows: int
) -> Tensor:
    """[pool_rows, K] in x's dtype: s^T x of each segment at its pool rows, 0 elsewhere; see `gradient_tiles`."""
    out = x.new_zeros(pool_rows, x.shape[1])
    rule = gradient_rule(x.shape[1], x.dtype)
    with torch.cuda.device_of(x):
        kernels.weight_gradient[(tiles.shape[0], -(-x.shape[1] // rule.block_k))](
            x_ptr=x,
            s_ptr=s,
            out_ptr=out,
            tiles_ptr=tiles,
            pages_ptr=tables[pages_at:],
            x_rows=x.shape[0],
            pool_rows=pool_rows,
            K=x.shape[1],
            columns=s.shape[1],
            BLOCK_M=rule.block_m,
            BLOCK_R=block_rank,
            BLOCK_K=rule.block_k,
            **launch_options(rule.warps, rule.stages),
        )
    return out


@weight_gradient_op.register_fake
def _(s: Tensor, x: Tensor, tables: Tensor, pages_at: int, tiles: Tensor, block_rank: int, pool_rows: int) -> Tensor:
    return x.new_empty(pool_rows, x.shape[1])


def _add(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, mid_scale: Tensor, tables: Tensor, how: Geometry,
    workspace: Callable[[int, int, int, torch.device], Tensor],
) -> Tensor:  # fmt: skip
    """Both launches of each family. Returns the partial sums."""
    arch = arch_of(y.device)
    tiles = [low_rank_tiles(group.family, x.shape[1], y.shape[1], y.dtype, arch) for group in how.groups]
    partial = workspace(max(t.split_k for t in tiles), x.shape[0], how.columns, x.device)
    with torch.cuda.device_of(y):
        for group, group_tiles in zip(how.groups, tiles, strict=True):
            _shrink(partial, x, a, mid_scale, tables, how, group, group_tiles)
            _expand(y, partial, b, tables, how, group, group_tiles)
    return partial


def new_workspace(splits: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Partial sums [splits, T, columns]; what no tile writes is never read."""
    return torch.empty(splits, rows, columns, dtype=torch.float32, device=device)


def _zero_workspace(splits: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """The same where all of it is read: families differ in splits, segments in rank."""
    return torch.zeros(splits, rows, columns, dtype=torch.float32, device=device)


def _shrink(
    partial: Tensor, x: Tensor, a: Tensor, mid_scale: Tensor, tables: Tensor, how: Geometry, group: TileGroup,
    tiles: LowRankTiles,
) -> None:  # fmt: skip
    kernel = kernels.shrink_rows if group.family is Family.ROWS else kernels.shrink_tiles
    kernel[(group.shrink_count, tiles.split_k)](
        x_ptr=x,
        a_ptr=a,
        scale_ptr=mid_scale,
        partial_ptr=partial,
        tiles_ptr=tables[group.shrink_at :],
        pages_ptr=tables[how.pages_at :],
        x_rows=x.shape[0],
        pool_rows=a.shape[0],
        K=x.shape[1],
        columns=how.columns,
        split_stride=partial.stride(0),
        **_block_m(group),
        BLOCK_R=group.block_rank,
        BLOCK_K=tiles.block_k,
        SPLIT_K=tiles.split_k,
        **launch_options(tiles.shrink_warps, tiles.shrink_stages),
    )


def _expand(
    y: Tensor, partial: Tensor, b: Tensor, tables: Tensor, how: Geometry, group: TileGroup, tiles: LowRankTiles
) -> None:
    kernel = kernels.expand_rows if group.family is Family.ROWS else kernels.expand_tiles
    kernel[(group.expand_count, -(-y.shape[1] // tiles.block_n))](
        y_ptr=y,
        b_ptr=b,
        partial_ptr=partial,
        tiles_ptr=tables[group.expand_at :],
        pages_ptr=tables[how.pages_at :],
        y_rows=y.shape[0],
        y_stride=y.stride(0),
        pool_rows=b.shape[0],
        N=y.shape[1],
        columns=how.columns,
        split_stride=partial.stride(0),
        **_block_m(group),
        BLOCK_R=group.block_rank,
        BLOCK_N=tiles.block_n,
        SPLIT_K=tiles.split_k,
        **launch_options(tiles.expand_warps, tiles.expand_stages),
    )


def _block_m(group: TileGroup) -> dict[str, int]:
    return {} if group.family is Family.ROWS else {"BLOCK_M": block_rows(group.family)}


def launch_options(warps: int, stages: int) -> dict[str, int | bool]:
    """What every launch takes besides arguments."""
    debug = os.environ.get("CHORUS_KERNELS_DEBUG") == "1"
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, "debug": debug}
