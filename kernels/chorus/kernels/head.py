"""`head`: each segment's own classification head, of one layer or two, on pooled or per-token states.

    logits[t] = W h + b         h = x[t], or act(D x[t] + c) where the segment's head has a dense layer

Heads differ in their number of labels, so logits are a rectangle of the widest, 0 past a segment's own labels and in
rows of no segment. Weights of all heads lie in one pool (`HeadPool`), a row for each label; dense layers in another.

On CPU short segments share their products: one GEMM over all labels that the batch uses, from which each row keeps its
own, and one bmm of dense layers. A segment with enough rows of its own (per-token heads) is computed alone. On CUDA the
same kernel computes either layer, its tiles from tables that the plan puts on the device (`head_tables`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.dispatch import TRITON_DTYPES, runs_triton
from chorus.kernels.head_tables import HeadCapacity, HeadTables, check_segments
from chorus.kernels.row_ops import check_rows
from chorus.kernels.types import HeadActivation, HeadPool, HeadSegment

# From this many rows on a segment gets GEMMs of its own, as in `low_rank`.
LONG_SEGMENT_ROWS = 32
# Dense layers are read as they lie while there are at most so many for each that is used: to gather one is to read it
# twice and write it once.
SPAN = 2


class HeadPlan:
    """How a batch of `rows` rows meets its heads. `triton` says whether Triton runs (on CUDA if None); a `capacity`
    gives the tables one size, to be written anew for replays of a CUDA graph.

    Raises:
        ValueError: segments overlap, run backwards, lie outside of the batch, have no labels or negative places, or the
            batch exceeds the capacity.
    """

    def __init__(
        self,
        segments: Sequence[HeadSegment],
        rows: int,
        device: torch.device,
        *,
        triton: bool | None = None,
        capacity: HeadCapacity | None = None,
    ) -> None:
        self.runs_triton = runs_triton(device, triton)
        self.device = torch.empty(0, device=device).device  # "cuda" is not equal to a tensor's "cuda:0"
        self._set(segments, rows)
        self.width = max((s.labels for s in self.segments), default=0) if capacity is None else capacity.labels
        self.pieces = _cut(self.segments) if device.type == "cpu" and not self.runs_triton else ()
        self.tables = HeadTables(self.segments, rows, device, capacity) if self.runs_triton else None

    def rewrite(self, segments: Sequence[HeadSegment], rows: int) -> None:
        """Another batch into the same tables, on the current stream and without waiting. Needs a capacity."""
        if self.tables is None:
            raise ValueError("capacity: a plan without one is not written anew")
        self.tables.rewrite(segments, rows)
        self._set(segments, rows)

    def _set(self, segments: Sequence[HeadSegment], rows: int) -> None:
        self.labels_needed, self.dense_needed = check_segments(segments, rows)
        self.segments = tuple(s for s in segments if s.start < s.end)
        self.rows = rows


def head(x: Tensor, pool: HeadPool, plan: HeadPlan, activation: HeadActivation = "tanh") -> Tensor:
    """Logits [T, width] of x [T, K], `width` being the plan's; see `reference.head`.

    x's rows may lie apart. `activation` follows the dense layers, where a segment has one.

    Raises:
        ValueError: x, the pool and the plan do not fit each other.
    """
    _check(x, pool, plan)
    if plan.tables is not None and x.dtype in TRITON_DTYPES:
        from chorus.kernels.head_launch import head_op  # Triton is not everywhere

        tables = plan.tables
        out: Tensor = head_op(x, *pool, tables.buffer, tables.flat_geometry, plan.width, activation)
        return out
    if x.device.type != "cpu" or plan.tables is not None:
        return reference.head(x, pool, plan.segments, plan.width, activation)
    logits = x.new_zeros(x.shape[0], plan.width)
    for piece in plan.pieces:
        piece.fill(logits, x, pool, activation)
    return logits


@dataclass(frozen=True, slots=True)
class _Places:
    """Places of a pool: a view where they are neighbours, else a gather."""

    first: int
    index: Tensor
    neighbours: bool

    @classmethod
    def of(cls, index: Tensor) -> "_Places":
        first = int(index[0])
        return cls(first, index, torch.equal(index, torch.arange(first, first + len(index))))

    def of_tensor(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(0, self.first, len(self.index)) if self.neighbours else tensor.index_select(0, self.index)


@dataclass(frozen=True, slots=True)
class _DenseLayers:
    """The dense layers that a piece multiplies with: `count` as they lie in the pool, nobody's among them, which meet
    zeros; or gathered where too many are nobody's, or segments share one."""

    first: int
    count: int
    index: Tensor | None

    @classmethod
    def of(cls, used: Sequence[int]) -> tuple["_DenseLayers", list[int]]:
        """The layers, and which of them each segment has, given its place in the pool."""
        first, count = min(used), max(used) - min(used) + 1
        if len(set(used)) == len(used) and count <= SPAN * len(used):
            return cls(first, count, None), [place - first for place in used]
        return cls(first, len(used), torch.tensor(used)), list(range(len(used)))

    def of_tensor(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(0, self.first, self.count) if self.index is None else tensor.index_select(0, self.index)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Segments of one kind, with or without a dense layer: one of many rows, or all that have few."""

    rows: Tensor
    """[R] of x, segment by segment."""
    labels: _Places
    """Rows of the pool, segment by segment: [sum of labels]."""
    columns: Tensor | None
    """[R, width], each row's columns among `labels`; None for one segment."""
    foreign: Tensor | None
    """[R, width], True past a row's own labels."""
    dense: _DenseLayers | None
    places: Tensor | None
    """[R], where in a rectangle [dense layers * longest] each row lies; None where rows fill it."""
    longest: int

    def fill(self, logits: Tensor, x: Tensor, pool: HeadPool, activation: HeadActivation) -> None:
        states = x.index_select(0, self.rows)
        if self.dense is not None:
            states = self._dense(states, pool, activation)
        out = F.linear(states, self.labels.of_tensor(pool.weight), self.labels.of_tensor(pool.bias))
        if self.columns is not None and self.foreign is not None:
            out = out.gather(1, self.columns).masked_fill_(self.foreign, 0)
        logits[self.rows, : out.shape[1]] = out

    def _dense(self, states: Tensor, pool: HeadPool, activation: HeadActivation) -> Tensor:
        """Segments side by side in one bmm, zeros where they have no rows: the weights are what costs."""
        assert self.dense is not None
        assert pool.dense_weight is not None
        assert pool.dense_bias is not None
        count, width = self.dense.count, states.shape[1]
        side_by_side = states
        if self.places is not None:
            side_by_side = states.new_zeros(count * self.longest, width).index_copy_(0, self.places, states)
        weight = self.dense.of_tensor(pool.dense_weight).transpose(1, 2)  # [S, K, K]
        bias = self.dense.of_tensor(pool.dense_bias)[:, None]  # [S, 1, K]
        out = torch.baddbmm(bias, side_by_side.view(count, self.longest, width), weight).view(-1, width)
        out = reference.head_activation(out, activation)
        return out if self.places is None else out.index_select(0, self.places)


def _cut(segments: Sequence[HeadSegment]) -> tuple[_Piece, ...]:
    long = [[s] for s in segments if s.end - s.start >= LONG_SEGMENT_ROWS]
    short = [s for s in segments if s.end - s.start < LONG_SEGMENT_ROWS]
    groups = [*long, [s for s in short if s.dense is None], [s for s in short if s.dense is not None]]
    return tuple(_piece(group) for group in groups if group)


def _piece(segments: Sequence[HeadSegment]) -> _Piece:
    lengths = torch.tensor([s.end - s.start for s in segments])
    counts = torch.tensor([s.labels for s in segments])
    longest, width = int(lengths.max()), int(counts.max())
    rows = torch.cat([torch.arange(s.start, s.end) for s in segments])
    labels = torch.cat([torch.arange(s.first, s.first + s.labels) for s in segments])
    columns = foreign = dense = places = None
    if len(segments) > 1:
        column = torch.arange(width)
        foreign = (column >= counts[:, None]).repeat_interleave(lengths, 0)
        first = (counts.cumsum(0) - counts)[:, None]
        columns = torch.minimum(first + column, first + counts[:, None] - 1).repeat_interleave(lengths, 0)
    if used := [s.dense for s in segments if s.dense is not None]:
        dense, layer = _DenseLayers.of(used)
        places = torch.cat([torch.arange(s.end - s.start) + i * longest for s, i in zip(segments, layer, strict=True)])
        if torch.equal(places, torch.arange(dense.count * longest)):
            places = None
    return _Piece(rows, _Places.of(labels), columns, foreign, dense, places, longest)


def _check(x: Tensor, pool: HeadPool, plan: HeadPlan) -> None:
    if x.dim() != 2 or pool.weight.dim() != 2 or pool.weight.shape[1] != x.shape[1]:
        raise ValueError(f"x: want [T, {pool.weight.shape[-1]}], as the pool's rows, got {tuple(x.shape)}")
    if x.shape[0] < plan.rows:
        raise ValueError(f"x: {x.shape[0]} rows, the plan was made for {plan.rows}")
    check_rows("x", x, plan.device)
    rows, width = pool.weight.shape
    slots = 0 if pool.dense_weight is None else pool.dense_weight.shape[0]
    shapes = {"bias": (rows,), "dense_weight": (slots, width, width), "dense_bias": (slots, width)}
    for name, tensor in pool._asdict().items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device or not tensor.is_contiguous()):
            raise ValueError(f"pool: {name} must be contiguous, {x.dtype}, on {x.device}")
        if tensor is not None and name in shapes and tensor.shape != shapes[name]:
            raise ValueError(f"pool: {name} must be {shapes[name]}, is {tuple(tensor.shape)}")
    if (pool.dense_weight is None) != (pool.dense_bias is None):
        raise ValueError("pool: dense_weight and dense_bias come together")
    if plan.labels_needed > rows or plan.dense_needed > slots:
        raise ValueError(
            f"pool: {rows} labels and {slots} dense layers, the plan names {plan.labels_needed} and {plan.dense_needed}"
        )
