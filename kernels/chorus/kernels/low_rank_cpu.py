"""`low_rank` on a CPU: segments are work items of one compiled kernel (`native.low_rank`), all sites that read the same
x in one call. A segment with enough rows (a long prompt's) to fill GEMMs of its own gets torch's.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from chorus.kernels.cpu_products import product_dtype
from chorus.kernels.reference import activate
from chorus.kernels.types import Activation, Epilogue, LowRankSegment, RankPool

if TYPE_CHECKING:
    from chorus.kernels.native.low_rank import ShortSegments

# From this many rows on a segment gets GEMMs of its own, without tiles. The kernel's time over theirs (2 cores,
# K = 1024, N = 1024 and 2816, rank 16, 1 and 4 segments): 0.2 to 0.5 at 16 rows, 0.4 to 0.9 at 64, 0.8 to 1.5 at 128.
# With tiles it is 0.15 at 8 segments of 64 rows, about 1 at 256 rows of one, 1.3 to 1.7 at 512 and 2048. Where torch
# does not multiply the dtype, and theirs are in float32: 0.3 at 8 segments of 64 rows, 0.5 at 256, 0.2 at 2048.
# With AMX 0.3 to 0.6 at 64 rows, 0.5 to 0.9 at 128, 0.8 to 1.2 at 256, 1 to 1.4 at 512.
LONG_SEGMENT_ROWS, LONG_IN_TILES, LONG_WITH_AMX = 64, 512, 256


class Shared(NamedTuple):
    """Segments by who computes them."""

    short: "ShortSegments | None"
    long: tuple["LongSegment", ...] = ()


class CpuSegments:
    """A batch's segments, shared out once it is known of which dtype the pools are."""

    def __init__(self, segments: Sequence[LowRankSegment]) -> None:
        self._used = [s for s in segments if s.start < s.end and s.pool_rows]
        self._shared: dict[int, Shared] = {}

    def shared_out(self, dtype: torch.dtype) -> Shared:
        least = _long_from(dtype)
        if least not in self._shared:
            self._shared[least] = self._by_length(least)
        return self._shared[least]

    def _by_length(self, least: int) -> Shared:
        from chorus.kernels.native.low_rank import ShortSegments

        long = [s for s in self._used if s.end - s.start >= least]
        short = [s for s in self._used if s.end - s.start < least]
        return Shared(
            ShortSegments.of(short) if short else None,
            tuple(LongSegment(s.start, s.end - s.start, _PoolRows.of(s.pool_rows), s.activation) for s in long),
        )


def _long_from(dtype: torch.dtype) -> int:
    from chorus.kernels.native.amx_tile import cpu_has_tiles  # numba is not everywhere
    from chorus.kernels.native.low_rank import runs_in_tiles

    if not runs_in_tiles(dtype):
        return LONG_SEGMENT_ROWS
    if product_dtype(dtype) != dtype:
        return sys.maxsize
    return LONG_WITH_AMX if cpu_has_tiles() else LONG_IN_TILES


class StaticSegments(CpuSegments):
    """Segments that are written anew, all for the compiled kernel."""

    def __init__(self, short: "ShortSegments") -> None:
        self._static = Shared(short)

    def shared_out(self, dtype: torch.dtype) -> Shared:
        return self._static


class CpuSite(NamedTuple):
    """What is added to y at one site."""

    y: Tensor
    pool: RankPool
    segments: CpuSegments
    mid_bias: Tensor | None = None


def low_rank_on_cpu(x: Tensor, sites: Sequence[CpuSite]) -> None:
    """Adds all segments' deltas to y at sites that read the same x. Its arguments are not checked."""
    from chorus.kernels.native import low_rank as native

    shared = [(site, site.segments.shared_out(site.pool.a.dtype)) for site in sites]
    short = [native.NativeSite(y, pool, of.short, bias) for (y, pool, _, bias), of in shared if of.short is not None]
    if short:
        native.low_rank(x, short)
    for (y, pool, _, bias), of in shared:
        for segment in of.long:
            segment.add(y, x, pool, bias)


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


@dataclass(frozen=True, slots=True)
class LongSegment:
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
    """act(mid_scale * middle + mid_bias), middle [t, r]; one rounding where it is more than a scale."""
    scale = pool_rows.of_tensor(mid_scale)
    if mid_bias is None and not activation:
        return middle.mul_(scale)
    exact = middle.to(torch.promote_types(middle.dtype, torch.float32)).mul_(scale)
    if mid_bias is not None:
        exact.add_(pool_rows.of_tensor(mid_bias))
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
