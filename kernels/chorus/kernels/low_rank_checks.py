"""What `low_rank` refuses: checked on the host from shapes, strides and dtypes alone (and a CPU's token ids),
nothing waits for a device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.kernels.types import Epilogue, LowRankSegment, RankPool


class Needs(NamedTuple):
    """How many rows of a batch, rows of a pool and vectors of an epilogue a plan's segments name at least."""

    rows: int
    pool_rows: int
    vectors: int


def needs_of(segments: Sequence[LowRankSegment]) -> Needs:
    """Raises:
    ValueError: segments overlap, run backwards, or name a negative row, pool row or vector.
    """
    end = pool_rows = vectors = 0
    for s in segments:
        if s.start < end or s.end < s.start:
            raise ValueError(f"segments: [{s.start}, {s.end}) overlaps the one before or runs backwards")
        if s.pool_rows and min(s.pool_rows) < 0:
            raise ValueError(f"segments: pool row {min(s.pool_rows)} is negative")
        if s.vector is not None and s.vector < 0:
            raise ValueError(f"segments: vector {s.vector} is negative")
        end = s.end
        pool_rows = max(pool_rows, 1 + max(s.pool_rows, default=-1))
        vectors = max(vectors, 0 if s.vector is None else s.vector + 1)
    return Needs(end, pool_rows, vectors)


def check(y: Tensor, x: Tensor, pool: RankPool, needs: Needs) -> None:
    """Raises ValueError where x, y and pool do not fit each other or the plan."""
    ids = x.dim() == 1 and x.dtype == torch.int64
    if not (ids or x.dim() == 2) or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x, y: want [T, K] or ids [T], and [T, N]; got {tuple(x.shape)} and {tuple(y.shape)}")
    k = pool.a.shape[1] if ids else x.shape[1]
    if pool.a.shape[1] != k or pool.b.shape[1] != y.shape[1] or pool.a.shape[0] != pool.b.shape[0]:
        raise ValueError(f"pool: {tuple(pool.a.shape)} and {tuple(pool.b.shape)} do not fit K, N of x, y")
    if needs.rows > x.shape[0]:
        raise ValueError(f"plan: made for at least {needs.rows} rows, x has {x.shape[0]}")
    rows, scales = pool.a.shape[0], tuple(pool.mid_scale.shape)
    if needs.pool_rows > rows or scales != (rows,):
        raise ValueError(f"pool: the plan names {needs.pool_rows} rows; it has {rows}, and scales {scales}")
    if not (y.dtype == pool.a.dtype == pool.b.dtype and (ids or x.dtype == y.dtype)):
        raise ValueError(f"dtypes differ: y {y.dtype}, x {x.dtype}, a {pool.a.dtype}, b {pool.b.dtype}")
    if not y.device == x.device == pool.a.device == pool.b.device == pool.mid_scale.device:
        raise ValueError(f"y: on {y.device}; x is on {x.device}, the pool on {pool.a.device}")
    if not x.is_contiguous():
        raise ValueError(f"x: must be contiguous, has strides {x.stride()}")
    if not y.is_contiguous() and (y.stride(1) != 1 or y.stride(0) < y.shape[1]):
        raise ValueError(f"y: rows must be contiguous and lie apart, strides are {y.stride()}")


def check_epilogue(y: Tensor, pool: RankPool, needs: Needs, epilogue: Epilogue | None) -> None:
    """Raises ValueError where an epilogue does not fit, or is missing though segments name vectors."""
    e = epilogue or Epilogue()
    if needs.vectors and not e.vectors:
        raise ValueError("epilogue: segments name vectors, it has none")
    rows = (pool.a.shape[0],)
    if e.mid_bias is not None and (tuple(e.mid_bias.shape) != rows or e.mid_bias.dtype != torch.float32):
        raise ValueError(f"epilogue: mid_bias must be {rows} in float32, is {tuple(e.mid_bias.shape)}")
    for name, vectors in e.vectors.items():
        if vectors.dim() != 2 or vectors.shape[1] != y.shape[1] or vectors.shape[0] < needs.vectors:
            want = f"[{needs.vectors} or more, {y.shape[1]}]"
            raise ValueError(f"epilogue: {name} must be {want}, is {tuple(vectors.shape)}")
        if vectors.dtype not in (y.dtype, torch.float32) or not vectors.is_contiguous():
            raise ValueError(f"epilogue: {name} must be contiguous, in {y.dtype} or float32; is {vectors.dtype}")
    for name, tensor in e._asdict().items():
        if tensor is not None and tensor.device != y.device:
            raise ValueError(f"epilogue: {name} is on {tensor.device}, y on {y.device}")


def check_for_kernels(pool: RankPool, epilogue: Epilogue | None) -> None:
    """Raises ValueError for what no kernel, of a GPU or a CPU, takes strides or other types for."""
    for name, tensor in pool._asdict().items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, has strides {tensor.stride()}")
    if pool.mid_scale.dtype != torch.float32:
        raise ValueError(f"pool: mid_scale must be float32, is {pool.mid_scale.dtype}")
    if epilogue is not None and epilogue.mid_bias is not None and not epilogue.mid_bias.is_contiguous():
        raise ValueError("epilogue: mid_bias must be contiguous")


def check_for_triton(x: Tensor, pool: RankPool, epilogue: Epilogue | None, device: torch.device) -> None:
    """The same, and where x lies."""
    if x.device != device:
        raise ValueError(f"x: on {x.device}, the plan is on {device}")
    check_for_kernels(pool, epilogue)


def check_ids(x: Tensor, pool: RankPool) -> None:
    """Raises ValueError where x, token ids on a CPU, names a column that A does not have."""
    if x.numel():
        lowest, highest = (int(edge) for edge in x.aminmax())
        if lowest < 0 or highest >= pool.a.shape[1]:
            raise ValueError(f"x: token ids must be 0 to {pool.a.shape[1] - 1}, are {lowest} to {highest}")


def check_disjoint(ys: Sequence[Tensor]) -> None:
    """Raises ValueError where two outputs of one launch share memory: their programs would undo each other's sums.

    Rows of columns of one tensor lie the same distance apart, so one row says it for all. Outputs among each other's
    rows that lie differently far apart are refused without looking further.
    """
    for i, first in enumerate(ys):
        for j, second in enumerate(ys[:i]):
            if _meet(second, first):
                raise ValueError(f"ys: {j} and {i} share memory, want columns or tensors apart")


def _meet(first: Tensor, second: Tensor) -> bool:
    size, (rows, width), apart = first.element_size(), first.shape, first.stride(0)
    ahead = (second.data_ptr() - first.data_ptr()) // size
    if not rows or ahead >= (rows - 1) * apart + width or -ahead >= (rows - 1) * second.stride(0) + second.shape[1]:
        return False
    if rows == 1 or apart != second.stride(0):
        return True
    return ahead % apart < width or ahead % apart + second.shape[1] > apart
