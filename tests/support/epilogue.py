"""low_rank with all that may lie around its two products: batches, and the definition in float64, row by row."""

import math
from collections.abc import Callable

import torch

from chorus.kernels import Activation, Epilogue, LowRankSegment, RankPool

VECTORS = 4
ACTIVATIONS: dict[Activation, Callable[[float], float]] = {
    Activation.NONE: lambda v: v,
    Activation.RELU: lambda v: max(v, 0.0),
    Activation.GELU: lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
    Activation.GELU_TANH: lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
    Activation.SILU: lambda v: v / (1 + math.exp(-v)),
    Activation.TANH: math.tanh,
}
# (rows, rank, activation, vector): kinds side by side, one of vectors alone, one long.
MIXED = [
    (1, 8, Activation.NONE, None),
    (1, 16, Activation.RELU, 0),
    (2, 16, Activation.GELU, 1),
    (3, 5, Activation.GELU_TANH, None),
    (2, 0, Activation.NONE, 2),
    (40, 24, Activation.SILU, 3),
    (1, 8, Activation.TANH, 1),
    (1, 8, Activation.TANH, 1),
]


def segments_of(layout: list[tuple[int, int, Activation, int | None]]) -> list[LowRankSegment]:
    """Neighbours from row 1 on, whole pages each."""
    segments, row, used = [], 1, 0
    for rows, rank, activation, vector in layout:
        segments.append(LowRankSegment(row, row + rows, tuple(range(used, used + rank)), activation, vector))
        row, used = row + rows, used + -(-rank // 8) * 8
    return segments


def make_epilogue(pool_rows: int, n: int, dtype: torch.dtype, generator: torch.Generator) -> Epilogue:
    """Everything at once; scales about 1."""
    bias, scale, times, plus = (torch.randn(VECTORS, n, generator=generator) * 0.5 for _ in range(4))
    mid_bias = torch.randn(pool_rows, generator=generator) * 0.5
    return Epilogue(mid_bias, bias.to(dtype), (scale + 1).to(dtype), (times + 1).to(dtype), plus.to(dtype))


def without(epilogue: Epilogue, kept: tuple[str, ...]) -> Epilogue:
    return Epilogue(**{name: tensor if name in kept else None for name, tensor in epilogue._asdict().items()})


def defined(
    y: torch.Tensor, x: torch.Tensor, pool: RankPool, segments: list[LowRankSegment], epilogue: Epilogue
) -> torch.Tensor:
    out = y.double().clone()
    for s in segments:
        rows = list(s.pool_rows)
        a, b, scale = (tensor[rows].double() for tensor in pool)
        bias = torch.zeros(len(rows)) if epilogue.mid_bias is None else epilogue.mid_bias[rows]
        of = {} if s.vector is None else {name: v[s.vector].double() for name, v in epilogue.vectors.items()}
        for t in range(s.start, s.end):
            middle = [ACTIVATIONS[s.activation](v) for v in (scale * (a @ x[t].double()) + bias.double()).tolist()]
            delta = torch.tensor(middle, dtype=torch.float64) @ b
            delta = (delta + of.get("out_bias", 0)) * of.get("out_scale", 1)
            out[t] = (out[t] + delta) * of.get("row_scale", 1) + of.get("row_add", 0)
    return out
