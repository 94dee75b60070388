"""Batches for paged attention on Triton, and the bound on its error."""

import torch

from chorus.kernels import AttentionRow

BLOCK = 16
# RMS(err) / RMS(ref), and max |err| / RMS(ref) beside it.
BOUND = {torch.float32: (1e-5, 1e-4), torch.float16: (4e-3, 4e-2), torch.bfloat16: (4e-3, 4e-2)}


def batch(
    lengths: list[tuple[int, int]], heads: tuple[int, int], dim: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[AttentionRow]]:
    """Query, caches and rows of (new, old) tokens; pages scattered, full of others' keys where they are not theirs."""
    generator = torch.Generator().manual_seed(seed)
    pages = sum(-(-(new + old) // BLOCK) for new, old in lengths) + 2
    free = torch.randperm(pages, generator=generator).tolist()
    rows, start = [], 0
    for new, old in lengths:
        rows.append(AttentionRow(start, start + new, new + old, [free.pop() for _ in range(-(-(new + old) // BLOCK))]))
        start += new
    query = torch.randn(start, heads[0], dim, generator=generator).to(dtype)
    k_cache, v_cache = (torch.randn(pages, heads[1], BLOCK, dim, generator=generator).to(dtype) for _ in range(2))
    return query, k_cache, v_cache, rows


def check(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error, scale = got.double() - expected, float(expected.square().mean().sqrt())
    rms_bound, max_bound = BOUND[dtype]
    assert float(error.square().mean().sqrt()) <= rms_bound * scale
    assert float(error.abs().max()) <= max_bound * scale
