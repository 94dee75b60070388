"""What `filtered_draw` means, in exact arithmetic, one row at a time: its tests' oracle."""

import math
from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch import Tensor

LAST = math.nextafter(1.0, 0.0)
# Sums and products of these are exact in float64, so that a tie is one; the bounds of gathering are among them.
WEIGHTS = (1.0, 1.0, 0.75, 0.5, 2.0**-8, 1.5 * 2**-9, 2.0**-16, 2.0**-17, 2.0**-25, 0.0)
ROWS = st.lists(st.sampled_from(WEIGHTS), max_size=11).map(lambda row: [*row, 1.0]) | st.lists(
    st.sampled_from([1.0, 0.5]), max_size=11
).map(lambda row: [1.0, *row])
TOP_P = st.sampled_from([2.0**-10, 0.25, 0.5, 0.75, 1 - 2.0**-10, 1.0])
NOISE = st.integers(0, 63).map(lambda share: share / 64) | st.just(LAST)


def definition(weights: list[float], total: float, top_k: int, top_p: float, noise: float) -> int:
    """The token that is drawn; -1 where there is nothing, or NaN."""
    if any(math.isnan(weight) for weight in weights):
        return -1
    kept = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    mass = Fraction(total)
    if 0 < top_k < len(weights):
        kept = kept[:top_k]
        mass = sum((Fraction(weights[token]) for token in kept), Fraction(0))
    if top_p < 1:
        kept = shortest_run(weights, kept, mass * Fraction(top_p))
    target = Fraction(noise) * sum((Fraction(weights[token]) for token in kept), Fraction(0))
    reached = Fraction(0)
    for token in kept:
        reached += Fraction(weights[token])
        if reached > target:
            return token
    return -1


def shortest_run(weights: list[float], ranked: list[int], wanted: Fraction) -> list[int]:
    reached, run = Fraction(0), list[int]()
    for token in ranked:
        if run and reached >= wanted:
            break
        run.append(token)
        reached += Fraction(weights[token])
    return run


def arguments(
    rows: list[list[float]], filters: list[tuple[int, float, float]], device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights, shorter rows filled up with 0, their totals, top_k, top_p and noise."""
    width = max(map(len, rows))
    weights = torch.tensor([row + [0.0] * (width - len(row)) for row in rows], device=device)
    top_k, top_p, noise = zip(*filters, strict=True)
    vectors = [torch.tensor(values, dtype=torch.float64, device=device) for values in (top_p, noise)]
    return weights, weights.sum(dim=-1), torch.tensor(top_k, device=device), vectors[0], vectors[1]


def expected(weights: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, noise: Tensor) -> list[int]:
    columns = (weights.tolist(), totals.tolist(), top_k.tolist(), top_p.tolist(), noise.tolist())
    return [definition(*row) for row in zip(*columns, strict=True)]


def many(vocabulary: int, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A row for each sharpness, from a certain token to nearly equal ones, of bf16 logits, which are often equal."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 20.0, 200.0] * 3)[:, None]
    logits = (torch.randn(24, vocabulary, generator=generator) * spread).bfloat16().float()
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    weights[8:16] = weights[8:16].masked_fill(weights[8:16] < 0.01, 0)
    weights[16], weights[17], weights[18, -1] = 0, torch.nan, torch.nan
    top_k = torch.randint(1, 2 * vocabulary, (24,), generator=generator)
    top_k[::3], top_k[1::5] = 0, 40
    top_p = torch.rand(24, generator=generator, dtype=torch.float64)
    top_p[::4] = 1.0
    noise = torch.rand(24, generator=generator, dtype=torch.float64)
    there = [t.to(device) for t in (weights, top_k, top_p, noise)]
    return there[0], there[0].sum(dim=-1), there[1], there[2], there[3]
