"""Inputs for the operators between a layer's linears, and their definitions in float64."""

import torch
from torch import Tensor

from chorus.kernels import Norm, RowPlan, residual_norm
from chorus.kernels.types import NormKind
from support.rows import Layout, check_close, noise, poisoned_memory, segments_of, slot_of_rows

SLOTS = 6
EPS = 1e-5


def make_norm(kind: NormKind, width: int, dtype: torch.dtype, seed: int, *, pooled: bool, device: str = "cpu") -> Norm:
    """Vectors far from 1 and 0; a LayerNorm has a bias."""

    def vectors(number: int, *shape: int) -> Tensor:
        return (noise(seed + number, *shape, width) + 0.5).to(dtype).to(device)

    has_bias = kind == "layer"
    return Norm(
        kind, vectors(1), EPS, vectors(2) if has_bias else None,
        vectors(3, SLOTS) if pooled else None, vectors(4, SLOTS) if pooled and has_bias else None,
    )  # fmt: skip


def definition(h: Tensor, norm: Norm, slots: list[int | None]) -> Tensor:
    """Row by row in float64."""
    out = torch.empty(h.shape, dtype=torch.float64)
    for row, slot in enumerate(slots):
        v = h[row].double().cpu()
        weight = norm.weight if slot is None or norm.weights is None else norm.weights[slot]
        bias = norm.bias if slot is None or norm.biases is None else norm.biases[slot]
        if norm.kind == "layer":
            v = v - v.mean()
        scale = weight.double().cpu() + (norm.kind == "rms_plus_one")
        out[row] = v / (v.square().mean() + norm.eps).sqrt() * scale
        if bias is not None:
            out[row] += bias.double().cpu()
    return out


def check_norm(
    kind: NormKind, layout: Layout, width: int, dtype: torch.dtype, *, with_x: bool = True, strided: bool = False,
    seed: int = 0, plan: RowPlan | None = None, device: str = "cpu", triton: bool | None = None,
) -> None:  # fmt: skip
    """The residual is the rounded sum; its norm is within the bound, nothing unwritten, the same bits again."""
    segments, rows = segments_of(layout)
    plan = plan or RowPlan(segments, rows, torch.device(device), triton=triton)
    norm = make_norm(kind, width, dtype, seed, pooled=True, device=device)
    outer = 3 if strided else 0
    start = (noise(seed, rows, width + 2 * outer) + 0.3).to(dtype)
    x = noise(seed + 9, rows, width + 2 * outer).to(dtype) if with_x else None
    columns = slice(outer, outer + width)
    summed = start.clone()
    if x is not None:
        summed[:, columns] = (start[:, columns].float() + x[:, columns].float()).to(dtype)
    outcomes = []
    for _ in range(2):
        residual = start.to(device, copy=True)
        with poisoned_memory():
            given = None if x is None else x.to(device)[:, columns]
            out = residual_norm(residual[:, columns], given, norm, plan)
        assert torch.equal(residual.cpu(), summed)
        outcomes.append(out.cpu())
    check_close(outcomes[0], definition(summed[:, columns], norm, slot_of_rows(layout)), dtype)
    assert torch.equal(*outcomes)
