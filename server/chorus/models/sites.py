"""Sites: the places of a base model that adapters attach to. Knows names and shapes, no tensors."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Site:
    """A linear layer of the base, y[T, out] = x[T, in] W, or an embedding, whose x are one-hot rows.

    `name` is the module path inside the transformers model (`model.layers.0.self_attn.q_proj`).
    `transposed` is True for GPT-2's Conv1D, whose weight is [in, out].
    `scale` is what the base multiplies the layer's result by before anything reads it: Gemma's embedding has one.
    `shard` is the axis that tensor parallelism splits: "column" (out), "row" (in) or "none".
    """

    name: str
    in_features: int
    out_features: int
    has_bias: bool = False
    transposed: bool = False
    is_lm_head: bool = False
    is_embedding: bool = False
    scale: float = 1.0
    shard: Literal["column", "row", "none"] = "none"
