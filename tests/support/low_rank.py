"""Batches for low_rank on Triton, and the check against dense float64 math from the definition."""

import torch

from chorus.kernels import LowRankPlan, LowRankSegment, RankPool, low_rank
from chorus.kernels.low_rank_lists import PAGE_ROWS

CPU = torch.device("cpu")
# RMS(err) / RMS(ref), and max |err| / RMS(ref) beside it.
BOUND = {torch.float32: (1e-5, 1e-4), torch.float16: (4e-3, 4e-2), torch.bfloat16: (4e-3, 4e-2)}
LAYOUTS = {
    "a decode step, all distinct": [(1, 16)] * 12,
    "a few decodes": [(1, 16), (2, 40), (1, 5)],
    "mixed ranks": [(1, 8), (2, 24), (1, 128), (4, 5), (1, 33)],
    "the largest ranks": [(1, 256), (5, 200), (33, 250)],
    "prefill beside decodes": [(1, 16), (50, 16), (1, 8), (70, 48), (17, 64)],
    "one giant segment": [(200, 16)],
    "rows without an adapter between": [(2, 0), (3, 8), (5, 0), (40, 24), (1, 0)],
    "empty segments": [(0, 16), (3, 16), (0, 8)],
}


def make_pool(k: int, n: int, dtype: torch.dtype, generator: torch.Generator, pages: int) -> RankPool:
    """Every row is used by somebody or stale: none is zero."""
    rows = pages * PAGE_ROWS
    return RankPool(
        a=torch.randn(rows, k, generator=generator).to(dtype),
        b=(torch.randn(rows, n, generator=generator) / k**0.5).to(dtype),
        mid_scale=torch.rand(rows, generator=generator) + 0.5,
    )


def dense(y: torch.Tensor, x: torch.Tensor, pool: RankPool, segments: list[LowRankSegment]) -> torch.Tensor:
    out = y.double().clone()
    for s in segments:
        rows = list(s.pool_rows)
        weight = pool.b[rows].double().T @ torch.diag(pool.mid_scale[rows].double()) @ pool.a[rows].double()  # [N, K]
        out[s.start : s.end] = y[s.start : s.end].double() + x[s.start : s.end].double() @ weight.T
    return out


def batch_of(layout: list[tuple[int, int]], *, first_row: int = 0, scatter: int | None = None) -> list[LowRankSegment]:
    """Neighbouring segments of (rows, rank); rank 0 stands for rows without an adapter. Pages in order, or shuffled."""
    count = sum(-(-rank // PAGE_ROWS) for _, rank in layout)
    order = list(range(count))
    if scatter is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(scatter)).tolist()
    segments, position = [], first_row
    for rows, rank in layout:
        own = [order.pop(0) for _ in range(-(-rank // PAGE_ROWS))]
        if rank:
            pool_rows = [page * PAGE_ROWS + i for page in own for i in range(PAGE_ROWS)][:rank]
            segments.append(LowRankSegment(position, position + rows, tuple(pool_rows)))
        position += rows
    return segments


def check(
    segments: list[LowRankSegment], total: int, k: int, n: int, dtype: torch.dtype, *,
    seed: int = 0, from_zero: bool = False, plan: LowRankPlan | None = None, device: torch.device = CPU,
) -> None:  # fmt: skip
    """Runs twice: within the bound of the definition, untouched elsewhere, the same bits again."""
    generator = torch.Generator().manual_seed(seed)
    pages = max((r // PAGE_ROWS + 1 for s in segments for r in s.pool_rows), default=1)
    pool = make_pool(k, n, dtype, generator, pages)
    x = torch.randn(total, k, generator=generator).to(dtype)
    y = torch.zeros(total, n, dtype=dtype) if from_zero else torch.randn(total, n, generator=generator).to(dtype)
    expected = dense(y, x, pool, segments)
    plan = plan or LowRankPlan(segments, device, triton=True)
    there = RankPool(*(tensor.to(device) for tensor in pool))
    got, again = (low_rank(y.to(device, copy=True), x.to(device), there, plan).cpu() for _ in range(2))
    touched = torch.zeros(total, dtype=torch.bool)
    for s in segments:
        touched[s.start : s.end] = True
    error, reference = (got.double() - expected)[touched], expected[touched]
    if reference.numel():
        scale = float(reference.pow(2).mean().sqrt())
        rms_bound, max_bound = BOUND[dtype]
        assert float(error.pow(2).mean().sqrt()) <= rms_bound * scale
        assert float(error.abs().max()) <= max_bound * scale
    assert torch.equal(got[~touched], y[~touched])
    assert torch.equal(got, again)
