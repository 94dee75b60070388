"""Batches of heads of different widths, and the check of `head` against torch's own linears, row by row."""

import torch
from torch import Tensor, nn

from chorus.kernels import HeadPlan, HeadPool, HeadSegment, head
from chorus.kernels.types import HeadActivation
from support.rows import check_close, noise, poisoned_memory

ACTIVATIONS: dict[HeadActivation, nn.Module] = {"tanh": nn.Tanh(), "relu": nn.ReLU(), "gelu": nn.GELU()}
# Rows, labels (0 stands for rows without a head), dense layer or none.
Layout = list[tuple[int, int, bool]]
LAYOUTS: dict[str, Layout] = {
    "one row a head": [(1, 2, False), (1, 5, False), (1, 1, False), (1, 17, False)],
    "two layers": [(1, 2, True), (1, 3, True), (1, 2, True)],
    "both kinds, uneven, rows without between": [
        (2, 3, True),
        (1, 0, False),
        (1, 2, False),
        (3, 9, True),
        (2, 0, False),
    ],
    "per-token heads beside short ones": [(40, 7, False), (1, 2, False), (33, 3, True), (2, 4, True)],
    "empty segments": [(0, 3, True), (2, 2, False), (0, 2, False)],
    "no head": [(3, 0, False)],
}


def segments_of(layout: Layout) -> tuple[list[HeadSegment], int]:
    """Places in the pools run against the order of the batch, with one unused place between any two."""
    segments, row, label, dense = [], 0, 1 + sum(labels + 1 for _, labels, _ in layout), 2 * len(layout)
    for rows, labels, two_layers in layout:
        label, dense = label - labels - 1, dense - 2
        if labels:
            segments.append(HeadSegment(row, row + rows, label, labels, dense if two_layers else None))
        row += rows
    return segments, row


def make_pool(layout: Layout, width: int, dtype: torch.dtype, seed: int) -> HeadPool:
    """Of matching size; what no segment uses is NaN."""
    labels, slots = 1 + sum(labels + 1 for _, labels, _ in layout), 2 * len(layout) + 1
    weight, bias = noise(seed + 1, labels, width) / width**0.5, noise(seed + 2, labels)
    dense_weight, dense_bias = noise(seed + 3, slots, width, width) / width**0.5, noise(seed + 4, slots, width) / 4
    unused, idle = torch.ones(labels, dtype=torch.bool), torch.ones(slots, dtype=torch.bool)
    for s in segments_of(layout)[0]:
        unused[s.first : s.first + s.labels] = False
        if s.dense is not None:
            idle[s.dense] = False
    for tensor, where in ((weight, unused), (bias, unused), (dense_weight, idle), (dense_bias, idle)):
        tensor[where] = float("nan")
    return HeadPool(*(t.to(dtype) for t in (weight, bias, dense_weight, dense_bias)))


def exact(x: Tensor, pool: HeadPool, segments: list[HeadSegment], width: int, activation: HeadActivation) -> Tensor:
    """torch's modules on one row after the other, in float64."""
    logits = torch.zeros(x.shape[0], width, dtype=torch.float64)
    weight, bias, dense_weight, dense_bias = (None if t is None else t.double() for t in pool)
    assert weight is not None
    assert bias is not None
    for s in segments:
        last = nn.Linear(x.shape[1], s.labels, dtype=torch.float64)
        last.weight.data, last.bias.data = weight[s.first : s.first + s.labels], bias[s.first : s.first + s.labels]
        layers: list[nn.Module] = [last]
        if s.dense is not None and dense_weight is not None and dense_bias is not None:
            dense = nn.Linear(x.shape[1], x.shape[1], dtype=torch.float64)
            dense.weight.data, dense.bias.data = dense_weight[s.dense], dense_bias[s.dense]
            layers = [dense, ACTIVATIONS[activation], last]
        with torch.no_grad():
            for row in range(s.start, s.end):
                logits[row, : s.labels] = nn.Sequential(*layers)(x[row].double())
    return logits


def check(
    layout: Layout, width: int, dtype: torch.dtype, activation: HeadActivation = "tanh", *, strided: bool = False,
    seed: int = 0, plan: HeadPlan | None = None, device: str = "cpu", triton: bool | None = None,
) -> None:  # fmt: skip
    """Within the bound, 0 where there are no labels, the same bits again."""
    segments, rows = segments_of(layout)
    pool = make_pool(layout, width, dtype, seed)
    wide = noise(seed, rows, width + 5).to(dtype)
    x = wide[:, 3 : 3 + width]
    plan = plan or HeadPlan(segments, rows, torch.device(device), triton=triton)
    there = HeadPool(*(None if t is None else t.to(device) for t in pool))  # type: ignore[arg-type]
    given = wide.to(device)[:, 3 : 3 + width] if strided else x.contiguous().to(device)
    with poisoned_memory():
        got, again = (head(given, there, plan, activation).cpu() for _ in range(2))
    expected = exact(x, pool, segments, plan.width, activation)
    own = torch.zeros(expected.shape, dtype=torch.bool)
    for s in segments:
        own[s.start : s.end, : s.labels] = True
    check_close(got[own], expected[own], dtype)
    assert not got[~own].any()
    assert torch.equal(got, again)
