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
    """Raises ValueError where x, y and pool do not fit each other or the plan.

    Shapes are asked for once: 1.8 instead of 2.7 us, 84 times a step.
    """
    a, b, mid_scale = pool
    of_x, of_y, of_a, of_b, dtype = x.shape, y.shape, a.shape, b.shape, y.dtype
    ids = len(of_x) == 1 and x.dtype == torch.int64
    if not (ids or len(of_x) == 2) or len(of_y) != 2 or of_x[0] != of_y[0]:
        raise ValueError(f"x, y: want [T, K] or ids [T], and [T, N]; got {tuple(of_x)} and {tuple(of_y)}")
    if of_a[1] != (of_a if ids else of_x)[1] or of_b[1] != of_y[1] or of_a[0] != of_b[0]:
        raise ValueError(f"pool: {tuple(of_a)} and {tuple(of_b)} do not fit K, N of x, y")
    if needs.rows > of_x[0]:
        raise ValueError(f"plan: made for at least {needs.rows} rows, x has {of_x[0]}")
    rows, scales = of_a[0], tuple(mid_scale.shape)
    if needs.pool_rows > rows or scales != (rows,):
        raise ValueError(f"pool: the plan names {needs.pool_rows} rows; it has {rows}, and scales {scales}")
    if not (dtype == a.dtype == b.dtype and (ids or x.dtype == dtype)):
        raise ValueError(f"dtypes differ: y {dtype}, x {x.dtype}, a {a.dtype}, b {b.dtype}")
    if not y.device == x.device == a.device == b.device == mid_scale.device:
        raise ValueError(f"y: on {y.device}; x is on {x.device}, the pool on {a.device}")
    if not x.is_contiguous():
        raise ValueError(f"x: must be contiguous, has strides {x.stride()}")
    if not y.is_contiguous() and (y.stride(1) != 1 or y.stride(0) < of_y[1]):
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
