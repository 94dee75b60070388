"""Launches the kernels of `low_rank` over a batch's tables: two launches a family, for all sites that read the same x.
Custom ops, so that torch.compile and CUDA graphs see one call that changes y.

CHORUS_KERNELS_DEBUG=1 compiles the kernels with their assertions: pages within the pool, tiles within the batch.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from chorus.kernels import triton_low_rank as kernels
from chorus.kernels import triton_low_rank_slots as slots
from chorus.kernels.low_rank_members import (
    MEMBERS,
    Member,
    Own,
    each,
    expand_tables,
    shrink_programs,
    shrink_rows_and_lanes,
    shrink_tables,
    steps,
    tile_rows,
)
from chorus.kernels.low_rank_tables import Geometry
from chorus.kernels.tuning import (
    FUSED_RULE,
    Family,
    LowRankTiles,
    arch_of,
    expand_lanes,
    expand_warps,
    gradient_rule,
    is_fused,
    low_rank_tiles,
)
from chorus.kernels.types import Epilogue


@torch.library.custom_op("chorus::low_rank", mutates_args=("y",))
def low_rank_op(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, mid_scale: Tensor, tables: Tensor, geometry: Sequence[int],
    mid_bias: Tensor | None = None, out_bias: Tensor | None = None, out_scale: Tensor | None = None,
    row_scale: Tensor | None = None, row_add: Tensor | None = None,
) -> None:  # fmt: skip
    """`low_rank` of x [T, K] onto y [T, N] for a batch's `LowRankTables`. Its arguments are not checked."""
    epilogue = Epilogue(mid_bias, out_bias, out_scale, row_scale, row_add)
    _add([Member(y, a, b, mid_scale, tables, Geometry.of(geometry), epilogue)], x, new_workspace)


@low_rank_op.register_fake
def _(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, mid_scale: Tensor, tables: Tensor, geometry: Sequence[int],
    mid_bias: Tensor | None = None, out_bias: Tensor | None = None, out_scale: Tensor | None = None,
    row_scale: Tensor | None = None, row_add: Tensor | None = None,
) -> None:  # fmt: skip
    return None


@torch.library.custom_op("chorus::low_rank_group", mutates_args=("ys",))
def low_rank_group_op(
    ys: Sequence[Tensor], x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], mid_scale: Sequence[Tensor],
    tables: Sequence[Tensor], geometries: Sequence[int],
) -> None:  # fmt: skip
    """The same for several outputs of one x, MEMBERS a launch. Before each geometry stands its length."""
    each = map(Member, ys, a, b, mid_scale, tables, _unpacked(geometries))
    for members in iter(lambda: list(islice(each, MEMBERS)), []):
        _add(members, x, new_workspace)


@low_rank_group_op.register_fake
def _(
    ys: Sequence[Tensor], x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], mid_scale: Sequence[Tensor],
    tables: Sequence[Tensor], geometries: Sequence[int],
) -> None:  # fmt: skip
    return None


@torch.library.custom_op("chorus::low_rank_keeping_s", mutates_args=("y",))
def low_rank_keeping_s_op(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, mid_scale: Tensor, tables: Tensor, geometry: Sequence[int]
) -> Tensor:
    """The same, and s [T, columns] float32, 0 where a row has no such rank lane: what the backward needs."""
    return _add([Member(y, a, b, mid_scale, tables, Geometry.of(geometry))], x, _zero_workspace, may_fuse=False).sum(0)


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


def _unpacked(geometries: Sequence[int]) -> Iterator[Geometry]:
    at = 0
    while at < len(geometries):
        length = geometries[at]
        yield Geometry.of(geometries[at + 1 : at + 1 + length])
        at += 1 + length


def _add(
    members: Sequence[Member],
    x: Tensor,
    workspace: Callable[[int, int, int, torch.device], Tensor],
    *,
    may_fuse: bool = True,
) -> Tensor:
    """The launches of each family and rank block of the members. Returns the partial sums of what is not fused."""
    arch = arch_of(x.device)
    widths = [member.y.shape[1] for member in members]
    width = _widest(widths)
    kinds = sorted({(group.family, group.block_rank) for member in members for group in member.how.groups})
    tiles = [low_rank_tiles(family, x.shape[1], width, x.dtype, arch) for family, _ in kinds]
    columns = max(member.how.columns for member in members)
    partial = workspace(max(t.split_k for t in tiles), x.shape[0], columns * len(members), x.device)
    with torch.cuda.device_of(x):
        for kind, kind_tiles in zip(kinds, tiles, strict=True):
            own = [(m, g) for m in members for g in m.how.groups if (g.family, g.block_rank) == kind]
            if may_fuse and is_fused(kind[0], max(g.expand_count for _, g in own), x.shape[1], widths, x.dtype):
                _fused(x, own)
                continue
            if any(group.shrink_count for _, group in own):  # none where rows have vectors alone
                _shrink(partial, x, own, columns, kind_tiles)
            _expand(partial, own, columns, kind_tiles)
    return partial


def _widest(widths: Sequence[int]) -> int:
    """What the tiles of a launch over outputs of these widths are chosen by: one odd width makes the launch odd."""
    return max([width for width in widths if width % 16] or widths)


def new_workspace(splits: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Partial sums [splits, T, columns]; what no tile writes is never read."""
    return torch.empty(splits, rows, columns, dtype=torch.float32, device=device)


def _zero_workspace(splits: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """The same where all of it is read: families differ in splits, segments in rank."""
    return torch.zeros(splits, rows, columns, dtype=torch.float32, device=device)


def _shrink(partial: Tensor, x: Tensor, own: Sequence[Own], columns: int, tiles: LowRankTiles) -> None:
    family, members = own[0][1].family, [member for member, _ in own]
    counts = shrink_programs(own)
    _shrink_of(family)[(max(counts), tiles.split_k, len(own))](
        x_ptr=x,
        a_ptr=members[0].a,
        scale_ptr=members[0].mid_scale,
        partial_ptr=partial,
        **shrink_tables(own),
        **each("count", counts),
        **steps("a", [member.a for member in members]),
        **steps("scale", [member.mid_scale for member in members]),
        x_rows=x.shape[0],
        pool_rows=members[0].a.shape[0],
        K=x.shape[1],
        columns=partial.shape[2],
        member_columns=columns,
        split_stride=partial.stride(0),
        **shrink_rows_and_lanes(own[0][1]),
        BLOCK_K=tiles.block_k,
        SPLIT_K=tiles.split_k,
        MEMBERS=len(own),
        **launch_options(tiles.shrink_warps, tiles.shrink_stages),
    )


def _expand(partial: Tensor, own: Sequence[Own], columns: int, tiles: LowRankTiles) -> None:
    family, members = own[0][1].family, [member for member, _ in own]
    widths = [member.y.shape[1] for member in members]
    activated = any(member.how.activated for member in members)
    between = activated or members[0].epilogue.mid_bias is not None
    lanes, stages = expand_lanes(own[0][1].block_rank, tiles.expand_stages, members[0].y.dtype, between=between)
    counts = [group.expand_count for _, group in own]
    _expand_of(family)[(max(counts), -(-max(widths) // tiles.block_n), len(own))](
        y_ptr=members[0].y,
        b_ptr=members[0].b,
        partial_ptr=partial,
        **expand_tables(own),
        **each("count", counts),
        **steps("b", [member.b for member in members]),
        **steps("y", [member.y for member in members]),
        **each("y_stride", [member.y.stride(0) for member in members]),
        **each("N", widths),
        **{f"{name}_ptr": tensor for name, tensor in members[0].epilogue._asdict().items()},
        y_rows=partial.shape[1],
        pool_rows=members[0].b.shape[0],
        columns=partial.shape[2],
        member_columns=columns,
        split_stride=partial.stride(0),
        **tile_rows(family),
        BLOCK_R=lanes,
        BLOCK_N=tiles.block_n,
        SPLIT_K=tiles.split_k,
        MEMBERS=len(own),
        ACTIVATED=activated,
        **launch_options(expand_warps(family, tiles.expand_warps, between=between), stages),
    )


def _fused(x: Tensor, own: Sequence[Own]) -> None:
    members, widths = [member for member, _ in own], [member.y.shape[1] for member, _ in own]
    kernels.fused_rows[(max(group.expand_count for _, group in own), -(-max(widths) // FUSED_RULE.block_n), len(own))](
        y_ptr=members[0].y,
        x_ptr=x,
        a_ptr=members[0].a,
        scale_ptr=members[0].mid_scale,
        b_ptr=members[0].b,
        **expand_tables(own),
        **each("count", [group.expand_count for _, group in own]),
        **steps("a", [member.a for member in members]),
        **steps("scale", [member.mid_scale for member in members]),
        **steps("b", [member.b for member in members]),
        **steps("y", [member.y for member in members]),
        **each("y_stride", [member.y.stride(0) for member in members]),
        **each("N", widths),
        **{f"{name}_ptr": tensor for name, tensor in members[0].epilogue._asdict().items()},
        y_rows=x.shape[0],
        pool_rows=members[0].a.shape[0],
        K=x.shape[1],
        BLOCK_R=own[0][1].block_rank,
        BLOCK_K=FUSED_RULE.block_k,
        BLOCK_N=FUSED_RULE.block_n,
        MEMBERS=len(own),
        ACTIVATED=any(member.how.activated for member in members),
        **launch_options(FUSED_RULE.warps, FUSED_RULE.stages),
    )


def _shrink_of(family: Family) -> Any:
    if family is Family.SLOTS:
        return slots.shrink_slots
    return kernels.shrink_rows if family is Family.ROWS else kernels.shrink_tiles


def _expand_of(family: Family) -> Any:
    if family is Family.SLOTS:
        return slots.expand_slots
    return kernels.expand_rows if family is Family.ROWS else kernels.expand_tiles


def launch_options(warps: int, stages: int) -> dict[str, int | bool]:
    """What every launch takes besides arguments."""
    debug = os.environ.get("CHORUS_KERNELS_DEBUG") == "1"
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, "debug": debug}
