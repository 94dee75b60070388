"""`low_rank`: adds each segment's low-rank delta to the base's output, many adapters and mixed ranks in one call.

On CPU a batch is cut into pieces of three families, none of which loops over adapters of few rows:

- `_BatchedPiece`: neighbouring segments of equal length and rank, one bmm for all (a decode step's usual shape);
- `_MaskedPiece`: short segments of any rank: one GEMM over all their rank rows, what is another adapter's masked out;
- `_LongPiece`: a segment with enough rows (prefill) to fill a GEMM of its own.

On CUDA the Triton kernels run (`triton_low_rank`), over tables that the plan puts on the device (`low_rank_tables`).
Token ids as x, dtypes without a kernel and other devices take the specification. What a batch needs is planned once and
shared by all sites with the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.low_rank_tables import Capacity, LowRankTables
from chorus.kernels.types import LowRankSegment, RankPool

# From this many rows on a segment gets GEMMs of its own. 2 cores, K = N = 1024, 4 segments of r 16, bf16:
# own / masked = 1.9 at 8 rows, 1.0 at 32, 0.6 at 128.
LONG_SEGMENT_ROWS = 32
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
        self.pieces = _cut(self.segments) if device.type == "cpu" and not runs_triton else ()
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

    x [T, K], y [T, N], both contiguous; y is changed in place and returned. x may be token ids [T], int64, instead.
    Gradients flow into y, x, a and b (`low_rank_backward`), not for token ids.

    Raises:
        ValueError: x, y and pool do not fit each other or the plan.
    """
    _check_shapes(y, x, pool, plan)
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


class _Piece(Protocol):
    def add(self, y: Tensor, x: Tensor, pool: RankPool) -> None: ...


@dataclass(frozen=True, slots=True)
class _PoolRows:
    """Rank rows of a pool: a view where they are neighbours, else a gather (0.08 of the base linear's time)."""

    first: int
    count: int
    index: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[int]) -> "_PoolRows":
        contiguous = all(row == rows[0] + i for i, row in enumerate(rows))
        return cls(rows[0], len(rows), None if contiguous else torch.tensor(rows))

    def of_tensor(self, tensor: Tensor) -> Tensor:
        if self.index is None:
            return tensor.narrow(0, self.first, self.count)
        return tensor.index_select(0, self.index)


class _BatchedViews(NamedTuple):
    """A pool as one batched piece reads it; holds the pool, so that its id stays its own."""

    pool: RankPool
    a: Tensor  # [n, K, r]
    b: Tensor  # [n, r, N]
    alpha: float  # the scale that all rank rows share, else 1
    scale: Tensor | None  # [n, 1, r], None where they share one


@dataclass(frozen=True, slots=True)
class _BatchedPiece:
    """Views of the pools are kept: making them and asking for the scale took a tenth of a decode step's deltas."""

    start: int
    adapters: int
    rows_each: int
    rank: int
    pool_rows: _PoolRows
    kept: dict[int, _BatchedViews] = field(default_factory=dict, compare=False)

    def add(self, y: Tensor, x: Tensor, pool: RankPool) -> None:
        n, m = self.adapters, self.rows_each
        views = self.kept.get(id(pool)) or self._look(pool)
        xs = x.narrow(0, self.start, n * m).view(n, m, *x.shape[1:])  # [n, m, K] or [n, m]
        ys = y.narrow(0, self.start, n * m).view(n, m, -1)  # [n, m, N]
        middle = torch.bmm(xs, views.a) if x.dim() == 2 else views.a[torch.arange(n)[:, None], xs]  # [n, m, r]
        if views.scale is not None:
            middle.mul_(views.scale)
        ys.baddbmm_(middle, views.b, alpha=views.alpha)

    def _look(self, pool: RankPool) -> _BatchedViews:
        n, r = self.adapters, self.rank
        scale = self.pool_rows.of_tensor(pool.mid_scale)
        alpha = float(scale[0])
        shared = bool((scale == alpha).all())
        views = _BatchedViews(
            pool,
            self.pool_rows.of_tensor(pool.a).view(n, r, -1).transpose(1, 2),
            self.pool_rows.of_tensor(pool.b).view(n, r, -1),
            alpha if shared else 1.0,
            None if shared else scale.view(n, 1, r),
        )
        if self.pool_rows.index is None:  # a gather is a copy: not kept
            self.kept[id(pool)] = views
        return views


@dataclass(frozen=True, slots=True)
class _MaskedPiece:
    start: int
    count: int
    pool_rows: _PoolRows
    foreign: Tensor  # [count, rank rows], True where the rank row is not that row's adapter's

    def add(self, y: Tensor, x: Tensor, pool: RankPool) -> None:
        xs, ys = x.narrow(0, self.start, self.count), y.narrow(0, self.start, self.count)
        middle = _shrink(xs, self.pool_rows.of_tensor(pool.a))  # [count, rank rows]
        middle.mul_(self.pool_rows.of_tensor(pool.mid_scale)).masked_fill_(self.foreign, 0)
        ys.addmm_(middle, self.pool_rows.of_tensor(pool.b))


@dataclass(frozen=True, slots=True)
class _LongPiece:
    start: int
    count: int
    pool_rows: _PoolRows

    def add(self, y: Tensor, x: Tensor, pool: RankPool) -> None:
        xs, ys = x.narrow(0, self.start, self.count), y.narrow(0, self.start, self.count)
        middle = _shrink(xs, self.pool_rows.of_tensor(pool.a)).mul_(self.pool_rows.of_tensor(pool.mid_scale))
        ys.addmm_(middle, self.pool_rows.of_tensor(pool.b))


def _shrink(x: Tensor, a: Tensor) -> Tensor:
    """x A^T, [T, r], for rows x [T, K] or token ids [T] and A [r, K]."""
    return torch.mm(x, a.T) if x.dim() == 2 else a.index_select(1, x).T


def _cut(segments: Sequence[LowRankSegment]) -> tuple[_Piece, ...]:
    """Pieces for the segments; only neighbours share a piece, so that it reads and writes one slice of the batch."""
    pieces: list[_Piece] = []
    for run in _runs_of_neighbours(segments):
        for is_long, group in groupby(run, key=lambda s: s.end - s.start >= LONG_SEGMENT_ROWS):
            part = list(group)
            if is_long:
                pieces += [_LongPiece(s.start, s.end - s.start, _PoolRows.of(s.pool_rows)) for s in part]
            else:
                pieces.append(_short_piece(part))
    return tuple(pieces)


def _short_piece(segments: list[LowRankSegment]) -> _Piece:
    first = segments[0]
    rows_each, rank = first.end - first.start, len(first.pool_rows)
    pool_rows = _PoolRows.of([row for s in segments for row in s.pool_rows])
    if all(s.end - s.start == rows_each and len(s.pool_rows) == rank for s in segments):
        return _BatchedPiece(first.start, len(segments), rows_each, rank, pool_rows)
    count = segments[-1].end - first.start
    foreign = torch.ones(count, pool_rows.count, dtype=torch.bool)
    column = 0
    for s in segments:
        foreign[s.start - first.start : s.end - first.start, column : column + len(s.pool_rows)] = False
        column += len(s.pool_rows)
    return _MaskedPiece(first.start, count, pool_rows, foreign)


def _runs_of_neighbours(segments: Sequence[LowRankSegment]) -> list[list[LowRankSegment]]:
    runs: list[list[LowRankSegment]] = []
    for segment in segments:
        if segment.start == segment.end or not segment.pool_rows:
            continue
        if runs and runs[-1][-1].end == segment.start:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs


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


def _check_shapes(y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan) -> None:
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


def _check_for_triton(y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan) -> None:
    assert plan.tables is not None
    for name, tensor in {"y": y, "x": x, **pool._asdict()}.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, has strides {tensor.stride()}")
        if tensor.device != plan.tables.buffer.device:
            raise ValueError(f"{name}: on {tensor.device}, the plan is on {plan.tables.buffer.device}")
    if pool.mid_scale.dtype != torch.float32:
        raise ValueError(f"pool: mid_scale must be float32, is {pool.mid_scale.dtype}")
