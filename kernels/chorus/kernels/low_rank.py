"""`low_rank`: adds each segment's low-rank delta to the base's output, many adapters and mixed ranks in one call.

On CPU a batch is cut into pieces of vectorised torch (`low_rank_cpu`). On CUDA the Triton kernels run
(`triton_low_rank`), over tables that the plan puts on the device (`low_rank_tables`). Token ids as x, dtypes without a
kernel and other devices take the specification. What a batch needs is planned once and shared by all sites with the
same rows; sites that read the same x are one call, `low_rank_group`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.low_rank_cpu import cut
from chorus.kernels.low_rank_tables import Capacity, LowRankTables
from chorus.kernels.types import LowRankSegment, RankPool

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class LowRankPlan:
    """How one batch's segments are computed at the sites where they own the same pool rows. Reusable.

    On CPU it keeps views and scales of the pools it was used with: of no use once rows that it names were written anew.
    For Triton it holds tables, of fixed size and writable anew with a `capacity`. `triton` says whether Triton runs (on
    CPU tensors only in its interpreter); unless told, it does on CUDA.

    Raises:
        ValueError: segments overlap, run backwards, name negative pool rows, or, for Triton, rows that are not whole
            pages, or more than the capacity holds.
    """

    def __init__(
        self,
        segments: Sequence[LowRankSegment],
        device: torch.device,
        *,
        triton: bool | None = None,
        capacity: Capacity | None = None,
    ) -> None:
        runs_triton = device.type == "cuda" if triton is None else triton
        self._set(segments)
        self.pieces = cut(self.segments) if device.type == "cpu" and not runs_triton else ()
        self.tables = LowRankTables(self.segments, device, capacity) if runs_triton else None

    def rewrite(self, segments: Sequence[LowRankSegment]) -> None:
        """Another batch in the same tables, for replays of a CUDA graph. Only of a plan with a capacity."""
        if self.tables is None:
            raise ValueError("capacity: a plan without one is not written anew")
        self.tables.rewrite(tuple(segments))
        self._set(segments)

    def _set(self, segments: Sequence[LowRankSegment]) -> None:
        self.segments = tuple(segments)
        self.pool_rows = _check_segments(self.segments)


def low_rank(y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan) -> Tensor:
    """y[t] += (mid_scale * (x[t] A^T)) B for each row t of each segment; see `reference.low_rank`.

    x [T, K], contiguous; y [T, N], changed in place and returned, may be a slice of columns of a wider tensor: its rows
    are contiguous and lie apart. x may be token ids [T], int64, instead.
    Gradients flow into y, x, a and b (`low_rank_backward`), not for token ids.

    Raises:
        ValueError: x, y and pool do not fit each other or the plan.
    """
    _check(y, x, pool, plan)
    runs_triton = plan.tables is not None and x.dim() == 2 and y.dtype in TRITON_DTYPES
    if runs_triton:
        _check_for_triton(y, x, pool, plan)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *pool)):
        return _with_gradient(y, x, pool, plan, runs_triton)
    if runs_triton:
        return _on_triton(y, x, pool, plan)
    if y.device.type != "cpu" or plan.tables is not None:
        return reference.low_rank(y, x, pool, plan.segments)
    for piece in plan.pieces:
        piece.add(y, x, pool)
    return y


def low_rank_group(
    ys: Sequence[Tensor], x: Tensor, pools: Sequence[RankPool | None], plans: Sequence[LowRankPlan | None]
) -> None:
    """`low_rank` at sites that read the same x (q, k, v; gate, up): ys[i] [T, N_i], in place. None: nothing to add.

    Raises:
        ValueError: as `low_rank`, or the sequences differ in length.
    """
    if not len(ys) == len(pools) == len(plans):
        raise ValueError(f"ys, pools, plans: want as many of each, got {len(ys)}, {len(pools)} and {len(plans)}")
    members = [
        (y, pool, plan) for y, pool, plan in zip(ys, pools, plans, strict=True) if pool is not None and plan is not None
    ]
    if all(_triton_alone(y, x, pool, plan) for y, pool, plan in members):
        _group_on_triton(x, members)
        return
    for y, pool, plan in members:
        low_rank(y, x, pool, plan)


def _triton_alone(y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan) -> bool:
    """Whether nothing but Triton computes it: no gradients, no specification."""
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *pool))
    return plan.tables is not None and x.dim() == 2 and y.dtype in TRITON_DTYPES and not wants_gradient


def _group_on_triton(x: Tensor, members: Sequence[tuple[Tensor, RankPool, LowRankPlan]]) -> None:
    from chorus.kernels.low_rank_launch import low_rank_group_op  # Triton is not everywhere

    for y, pool, plan in members:
        _check(y, x, pool, plan)
        _check_for_triton(y, x, pool, plan)
    rows = {pool.a.shape[0] for _, pool, _ in members}
    if len(rows) > 1:
        raise ValueError(f"pools: want equally many rows in each, got {sorted(rows)}")
    used = [(y, pool, plan.tables) for y, pool, plan in members if plan.tables and plan.tables.geometry.groups]
    if used:
        ys, pools, tables = zip(*used, strict=True)
        geometries = [number for t in tables for number in (len(t.flat_geometry), *t.flat_geometry)]
        low_rank_group_op(ys, x, *map(list, zip(*pools, strict=True)), [t.buffer for t in tables], geometries)


def _on_triton(y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan) -> Tensor:
    from chorus.kernels.low_rank_launch import low_rank_op  # Triton is not everywhere

    assert plan.tables is not None
    if plan.tables.geometry.groups:
        low_rank_op(y, x, *pool, plan.tables.buffer, plan.tables.flat_geometry)
    return y


def _with_gradient(y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan, runs_triton: bool) -> Tensor:
    from chorus.kernels.low_rank_backward import LowRankFunction

    if x.dim() == 1:
        raise ValueError("x: token ids have no backward")
    if pool.mid_scale.requires_grad:
        raise ValueError("pool: mid_scale has no backward")
    if not any(s.start < s.end and s.pool_rows for s in plan.segments):
        return y
    out: Tensor = LowRankFunction.apply(  # type: ignore[no-untyped-call]
        y, x, *pool, plan.segments, plan.tables if runs_triton else None
    )
    return out


def _check_segments(segments: Sequence[LowRankSegment]) -> int:
    """How many rows a pool must have at least."""
    end = needed = 0
    for segment in segments:
        if segment.start < end or segment.end < segment.start:
            raise ValueError(f"segments: [{segment.start}, {segment.end}) overlaps the one before or runs backwards")
        if segment.pool_rows and min(segment.pool_rows) < 0:
            raise ValueError(f"segments: pool row {min(segment.pool_rows)} is negative")
        end = segment.end
        needed = max(needed, 1 + max(segment.pool_rows, default=-1))
    return needed


def _check(y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan) -> None:
    ids = x.dim() == 1 and x.dtype == torch.int64
    if not (ids or x.dim() == 2) or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x, y: want [T, K] or ids [T], and [T, N]; got {tuple(x.shape)} and {tuple(y.shape)}")
    k = pool.a.shape[1] if ids else x.shape[1]
    if pool.a.shape[1] != k or pool.b.shape[1] != y.shape[1] or pool.a.shape[0] != pool.b.shape[0]:
        raise ValueError(f"pool: {tuple(pool.a.shape)} and {tuple(pool.b.shape)} do not fit K, N of x, y")
    if plan.segments and plan.segments[-1].end > x.shape[0]:
        raise ValueError(f"plan: made for at least {plan.segments[-1].end} rows, x has {x.shape[0]}")
    rows, scales = pool.a.shape[0], tuple(pool.mid_scale.shape)
    if plan.pool_rows > rows or scales != (rows,):
        raise ValueError(f"pool: the plan names {plan.pool_rows} rows; it has {rows}, and scales {scales}")
    if not (y.dtype == pool.a.dtype == pool.b.dtype and (ids or x.dtype == y.dtype)):
        raise ValueError(f"dtypes differ: y {y.dtype}, x {x.dtype}, a {pool.a.dtype}, b {pool.b.dtype}")
    if not x.is_contiguous():
        raise ValueError(f"x: must be contiguous, has strides {x.stride()}")
    if not y.is_contiguous() and (y.stride(1) != 1 or y.stride(0) < y.shape[1]):
        raise ValueError(f"y: rows must be contiguous and lie apart, strides are {y.stride()}")


def _check_for_triton(y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan) -> None:
    assert plan.tables is not None
    for name, tensor in {"y": y, "x": x, **pool._asdict()}.items():
        if name != "y" and not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, has strides {tensor.stride()}")
        if tensor.device != plan.tables.buffer.device:
            raise ValueError(f"{name}: on {tensor.device}, the plan is on {plan.tables.buffer.device}")
    if pool.mid_scale.dtype != torch.float32:
        raise ValueError(f"pool: mid_scale must be float32, is {pool.mid_scale.dtype}")
