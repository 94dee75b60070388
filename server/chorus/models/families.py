"""The families served, a row each, and what about a config can not be served yet.

A new family is a row here and a row of the parity test.
"""

from dataclasses import dataclass
from typing import Any

from chorus.errors import FailedPrecondition


@dataclass(frozen=True, slots=True)
class Family:
    """A transformers decoder whose attention goes through AttentionInterface.

    `column` and `row` name the linears that tensor parallelism splits by output and by input.
    """

    model_type: str
    column: frozenset[str]
    row: frozenset[str]


_LLAMA_COLUMN = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
_LLAMA_ROW = frozenset({"o_proj", "down_proj"})

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", _LLAMA_COLUMN, _LLAMA_ROW),
        Family("qwen2", _LLAMA_COLUMN, _LLAMA_ROW),
        Family("qwen3", _LLAMA_COLUMN, _LLAMA_ROW),
        Family("mistral", _LLAMA_COLUMN, _LLAMA_ROW),
        Family("gpt2", frozenset({"c_attn", "c_fc"}), frozenset({"c_proj"})),
    )
}

# Scaled at load, the same for every row of a pack. Dynamic NTK and longrope depend on the longest row.
_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


def family_of(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        FailedPrecondition: a model type or a feature of it that is not served; names it.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise FailedPrecondition(
            f"model type {config.model_type!r} is not served; served are {', '.join(sorted(FAMILIES))}",
            reason="UNSUPPORTED_MODEL",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise FailedPrecondition(
            f"rope_type {rope_type!r} is not served: its frequencies depend on the longest row of a batch",
            reason="UNSUPPORTED_MODEL",
        )
    if getattr(config, "add_cross_attention", False) or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise FailedPrecondition(
            "add_cross_attention and scale_attn_by_inverse_layer_idx are not served", reason="UNSUPPORTED_MODEL"
        )
    return family
