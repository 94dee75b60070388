"""`low_rank` on a CPU: a batch cut into pieces of three families, none of which loops over adapters of few rows.

- `_BatchedPiece`: neighbouring segments of equal length and rank, one bmm shrinks all (a decode step's usual shape);
- `_MaskedPiece`: short segments of any rank: one GEMM over all their rank rows, of which each row takes its own;
- `_LongPiece`: a segment with enough rows (prefill) to fill a GEMM of its own.

The short ones expand by `torch.embedding_bag` where a number has 2 bytes: a row's bag is its rank rows of B, weighted
with s. It reads B where it lies, at 20 GB/s where baddbmm gets 9 (16 rows, rank 16, N = 1024, bf16, 2 cores: 27 us
against 66). Its sums are float32, rounded once, and once more when added to y. In float32 baddbmm is the faster one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from chorus.kernels.reference import activate
from chorus.kernels.types import Activation, Epilogue, LowRankSegment, RankPool

# From this many rows on a segment gets GEMMs of its own. 2 cores, K = N = 1024, 4 segments of r 16, bf16:
# own / masked = 1.9 at 8 rows, 1.0 at 32, 0.6 at 128.
LONG_SEGMENT_ROWS = 32


class Piece(Protocol):
    """Rows of a batch that are computed together."""

    def add(self, y: Tensor, x: Tensor, pool: RankPool, mid_bias: Tensor | None) -> None: ...


def cut(segments: Sequence[LowRankSegment]) -> tuple[Piece, ...]:
    """Pieces for the segments; only neighbours share a piece, so that it reads and writes one slice of the batch."""
    pieces: list[Piece] = []
    for run in _runs_of_neighbours(segments):
        for (is_long, _), group in groupby(run, key=lambda s: (s.end - s.start >= LONG_SEGMENT_ROWS, s.activation)):
            part = list(group)
            if is_long:
                pieces += [_LongPiece(s.start, s.end - s.start, _PoolRows.of(s.pool_rows), s.activation) for s in part]
            else:
                pieces.append(_short_piece(part))
    return tuple(pieces)


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


class _Bags(NamedTuple):
    """Which rows of B each row of a piece adds: all one after the other, and where each row's begin."""

    rows: Tensor
    starts: Tensor

    @classmethod
    def of(cls, segments: Sequence[LowRankSegment]) -> "_Bags":
        of_row = [s.pool_rows for s in segments for _ in range(s.start, s.end)]
        lengths = torch.tensor([0, *map(len, of_row)], dtype=torch.int32)
        return cls(
            torch.tensor([row for rows in of_row for row in rows], dtype=torch.int32),
            lengths.cumsum(0, dtype=torch.int32)[:-1],
        )

    def add(self, y: Tensor, s: Tensor, b: Tensor, alpha: float) -> None:
        """y[t] += alpha * (the sum of bag t's rows of b, weighted with its part of s, which is flat)."""
        added = torch.embedding_bag(b, self.rows, self.starts, False, 0, False, s)[0]
        y.add_(added, alpha=alpha)


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
    bags: _Bags
    activation: Activation
    kept: dict[int, _BatchedViews] = field(default_factory=dict, compare=False)

    def add(self, y: Tensor, x: Tensor, pool: RankPool, mid_bias: Tensor | None) -> None:
        n, m = self.adapters, self.rows_each
        views = self.kept.get(id(pool)) or self._look(pool)
        xs = x.narrow(0, self.start, n * m).view(n, m, *x.shape[1:])  # [n, m, K] or [n, m]
        ys = y.narrow(0, self.start, n * m)  # [n m, N]
        middle = torch.bmm(xs, views.a) if x.dim() == 2 else views.a[torch.arange(n)[:, None], xs]  # [n, m, r]
        alpha = views.alpha
        if mid_bias is not None or self.activation:
            middle, alpha = _between(middle, pool.mid_scale, mid_bias, self.pool_rows, self.activation), 1.0
        elif views.scale is not None:
            middle.mul_(views.scale)
        if y.dtype.itemsize == 2:
            self.bags.add(ys, middle.view(-1), pool.b, alpha)
        else:
            ys.view(n, m, -1).baddbmm_(middle, views.b, alpha=alpha)

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
    own: Tensor  # [sum of the rows' ranks], where in [count, rank rows] the own ones are
    bags: _Bags
    activation: Activation

    def add(self, y: Tensor, x: Tensor, pool: RankPool, mid_bias: Tensor | None) -> None:
        xs, ys = x.narrow(0, self.start, self.count), y.narrow(0, self.start, self.count)
        middle = _shrink(xs, self.pool_rows.of_tensor(pool.a))  # [count, rank rows]
        middle = _between(middle, pool.mid_scale, mid_bias, self.pool_rows, self.activation)
        if y.dtype.itemsize == 2:
            self.bags.add(ys, middle.reshape(-1).index_select(0, self.own), pool.b, 1.0)
        else:
            ys.addmm_(middle.masked_fill_(self.foreign, 0), self.pool_rows.of_tensor(pool.b))


@dataclass(frozen=True, slots=True)
class _LongPiece:
    start: int
    count: int
    pool_rows: _PoolRows
    activation: Activation

    def add(self, y: Tensor, x: Tensor, pool: RankPool, mid_bias: Tensor | None) -> None:
        xs, ys = x.narrow(0, self.start, self.count), y.narrow(0, self.start, self.count)
        middle = _shrink(xs, self.pool_rows.of_tensor(pool.a))
        middle = _between(middle, pool.mid_scale, mid_bias, self.pool_rows, self.activation)
        ys.addmm_(middle, self.pool_rows.of_tensor(pool.b))


def _shrink(x: Tensor, a: Tensor) -> Tensor:
    """x A^T, [T, r], for rows x [T, K] or token ids [T] and A [r, K]."""
    return torch.mm(x, a.T) if x.dim() == 2 else a.index_select(1, x).T


def _between(
    middle: Tensor, mid_scale: Tensor, mid_bias: Tensor | None, pool_rows: _PoolRows, activation: Activation
) -> Tensor:
    """act(mid_scale * middle + mid_bias), middle [t, r] or [n, m, r]; one rounding where it is more than a scale."""
    shape = (middle.shape[0], 1, middle.shape[2]) if middle.dim() == 3 else (-1,)
    scale = pool_rows.of_tensor(mid_scale).view(shape)
    if mid_bias is None and not activation:
        return middle.mul_(scale)
    exact = middle.to(torch.promote_types(middle.dtype, torch.float32)).mul_(scale)
    if mid_bias is not None:
        exact.add_(pool_rows.of_tensor(mid_bias).view(shape))
    return activate(exact, activation).to(middle.dtype)


class VectorRows(NamedTuple):
    """The rows of a batch whose segments name a vector, and which one each."""

    rows: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, segments: Sequence[LowRankSegment]) -> "VectorRows | None":
        """None where no segment does."""
        named = [(row, s.vector) for s in segments if s.vector is not None for row in range(s.start, s.end)]
        return cls(*torch.tensor(named).unbind(1)) if named else None

    def finish(self, y: Tensor, delta: Tensor, epilogue: Epilogue) -> None:
        """Adds delta to y, and does with it what the epilogue says where a row has a vector; rounds once."""
        kept = torch.promote_types(y.dtype, torch.float32)
        of = {name: v.index_select(0, self.vectors).to(kept) for name, v in epilogue.vectors.items()}  # [rows, N]
        own, base = delta.index_select(0, self.rows).to(kept), y.index_select(0, self.rows).to(kept)
        if "out_bias" in of:
            own += of["out_bias"]
        if "out_scale" in of:
            own *= of["out_scale"]
        base += own
        if "row_scale" in of:
            base *= of["row_scale"]
        if "row_add" in of:
            base += of["row_add"]
        y.add_(delta)
        y.index_copy_(0, self.rows, base.to(y.dtype))


def _short_piece(segments: list[LowRankSegment]) -> Piece:
    first = segments[0]
    rows_each, rank = first.end - first.start, len(first.pool_rows)
    pool_rows = _PoolRows.of([row for s in segments for row in s.pool_rows])
    bags = _Bags.of(segments)
    if all(s.end - s.start == rows_each and len(s.pool_rows) == rank for s in segments):
        return _BatchedPiece(first.start, len(segments), rows_each, rank, pool_rows, bags, first.activation)
    count = segments[-1].end - first.start
    foreign = torch.ones(count, pool_rows.count, dtype=torch.bool)
    column = 0
    for s in segments:
        foreign[s.start - first.start : s.end - first.start, column : column + len(s.pool_rows)] = False
        column += len(s.pool_rows)
    own = foreign.logical_not().view(-1).nonzero().squeeze(1)
    return _MaskedPiece(first.start, count, pool_rows, foreign, own, bags, first.activation)


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
