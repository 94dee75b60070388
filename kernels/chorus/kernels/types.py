"""What the operators take besides tensors: pools, segments, rows. All known on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


class RankPool(NamedTuple):
    """One site's adapter weights, a row per rank: a [R, K], b [R, N] in the model's dtype, mid_scale [R] in float32."""

    a: Tensor
    b: Tensor
    mid_scale: Tensor


@dataclass(frozen=True, slots=True)
class LowRankSegment:
    """Rows [start, end) of the batch use the pool's rows `pool_rows`, in rank order."""

    start: int
    end: int
    pool_rows: tuple[int, ...]


NormKind = Literal["rms", "rms_plus_one", "layer"]
"""Llama's RMSNorm, Gemma's with (1 + weight), LayerNorm."""


class Norm(NamedTuple):
    """A norm's weight [N] (and bias [N], of a LayerNorm), with what versions have in their place: weights [slots, N],
    biases [slots, N]. All in the model's dtype."""

    kind: NormKind
    weight: Tensor
    eps: float
    bias: Tensor | None = None
    weights: Tensor | None = None
    biases: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """One sequence in a packed batch: its new tokens are rows [start, end), its context holds `context` tokens with
    them.

    `blocks` is its block table: cache blocks in order of position, at least enough for `context`.
    """

    start: int
    end: int
    context: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class SlotSegment:
    """Rows [start, end) of the batch use what lies at `slot` of a pool of vectors [slots, N]."""

    start: int
    end: int
    slot: int
