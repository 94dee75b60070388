"""What the operators take besides tensors: pools, segments, rows. All known on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor


class RankPool(NamedTuple):
    """One site's adapter weights, a row per rank: a [R, K], b [R, N] in the model's dtype, mid_scale [R] in float32."""

    a: Tensor
    b: Tensor
    mid_scale: Tensor


class Activation(IntEnum):
    """What lies between the two products of `low_rank`."""

    NONE = 0
    RELU = 1
    GELU = 2
    GELU_TANH = 3
    SILU = 4
    TANH = 5


class Epilogue(NamedTuple):
    """What `low_rank` does at a site besides the two products; None where no adapter does it there.

    mid_bias [R], float32, is added before the activation. The others hold vectors [V, N] in the model's dtype or
    float32, of which a segment names one: y = row_scale * (y + out_scale * (delta + out_bias)) + row_add.
    """

    mid_bias: Tensor | None = None
    out_bias: Tensor | None = None
    out_scale: Tensor | None = None
    row_scale: Tensor | None = None
    row_add: Tensor | None = None

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Those that hold vectors, by name."""
        found = {name: getattr(self, name) for name in ("out_bias", "out_scale", "row_scale", "row_add")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class LowRankSegment:
    """Rows [start, end) of the batch use the pool's rows `pool_rows`, in rank order, and an epilogue's vector."""

    start: int
    end: int
    pool_rows: tuple[int, ...]
    activation: Activation = Activation.NONE
    vector: int | None = None

    @property
    def acts(self) -> bool:
        """Whether it changes any row."""
        return self.start < self.end and (bool(self.pool_rows) or self.vector is not None)


NormKind = Literal["rms", "rms_plus_one", "layer"]
"""Llama's RMSNorm, Gemma's with (1 + weight), LayerNorm."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm's weight [N] (and bias [N], of a LayerNorm), with what versions have in their place: weights [slots, N],
    biases [slots, N]. All in the model's dtype, contiguous. Checked here once, so that a call need not.

    Raises:
        ValueError: its vectors do not fit each other, or the kind.
    """

    kind: NormKind
    weight: Tensor
    eps: float
    bias: Tensor | None = None
    weights: Tensor | None = None
    biases: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(NormKind):
            raise ValueError(f"kind: {self.kind!r} is none of {get_args(NormKind)}")
        if self.kind != "layer" and (self.bias is not None or self.biases is not None):
            raise ValueError(f"bias: {self.kind} has none")
        if self.weights is not None and (self.bias is None) != (self.biases is None):
            raise ValueError("bias, biases: both or neither")
        width = self.weight.shape[0] if self.weight.dim() else 0
        shapes = {"weight": (width,), "bias": (width,), "weights": (self.slots, width), "biases": (self.slots, width)}
        for name, shape in shapes.items():
            vector: Tensor | None = getattr(self, name)
            if vector is not None and (
                vector.shape != shape
                or vector.dtype != self.weight.dtype
                or vector.device != self.weight.device
                or not vector.is_contiguous()
            ):
                raise ValueError(f"{name}: want {shape}, contiguous, of the weight's dtype on its device")

    @property
    def slots(self) -> int:
        return 0 if self.weights is None else self.weights.shape[0]

    @cached_property
    def one_plus_weight(self) -> Tensor:
        """1 + weight in float32, or float64: a CPU would spend a sixth of a norm's time on it."""
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)) + 1


class AttentionRow(NamedTuple):
    """One sequence in a packed batch: its new tokens are rows [start, end), its context holds `context` tokens with
    them.

    `blocks` is its block table: cache blocks in order of position, at least enough for `context`.
    """

    start: int
    end: int
    context: int
    blocks: Sequence[int]

    def used(self, block_size: int) -> Sequence[int]:
        """The blocks that hold the context."""
        return self.blocks[: -(-self.context // block_size)]

    def each_token(self) -> "list[AttentionRow]":
        """The new tokens as rows of their own, each with its context: what a causal row's tokens see."""
        first = self.context - self.end
        return [AttentionRow(i, i + 1, first + i + 1, self.blocks) for i in range(self.start, self.end)]


class SlotSegment(NamedTuple):
    """Rows [start, end) of the batch use what lies at `slot` of a pool of vectors [slots, N]."""

    start: int
    end: int
    slot: int


HeadActivation = Literal["tanh", "relu", "gelu"]
"""After a head's dense layer: RoBERTa's and BERT's pooler, DistilBERT's, ELECTRA's."""


class HeadPool(NamedTuple):
    """Heads' last layers, a row for each label of each head: weight [R, K], bias [R]; and the dense layers that some
    have before them: dense_weight [S, K, K], [out, in] as `nn.Linear` has it, dense_bias [S, K]. A bias that a head
    does not have is 0."""

    weight: Tensor
    bias: Tensor
    dense_weight: Tensor | None = None
    dense_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HeadSegment:
    """Rows [start, end) of the batch use the pool's rows [first, first + labels), after dense layer `dense` if any."""

    start: int
    end: int
    first: int
    labels: int
    dense: int | None = None
