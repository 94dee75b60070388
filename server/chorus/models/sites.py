"""Sites: the places of a base model that adapters attach to. Knows names and shapes, no tensors."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Site:
    """A linear layer of the base: y[T, out] = x[T, in] W.

    `name` is the module path inside the transformers model (`model.layers.0.self_attn.q_proj`).
    `transposed` is True for GPT-2's Conv1D, whose weight is [in, out].
    `shard` is the axis that tensor parallelism splits: "column" (out), "row" (in) or "none".
    """

    name: str
    in_features: int
    out_features: int
    has_bias: bool = False
    transposed: bool = False
    is_lm_head: bool = False
    shard: Literal["column", "row", "none"] = "none"
