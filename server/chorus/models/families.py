"""The families served, a row each, and what about a config can not be served yet.

A new family is a row here and a row of the parity test.
"""

from dataclasses import dataclass
from typing import Any

from chorus.errors import FailedPrecondition


@dataclass(frozen=True, slots=True)
class Family:
    """A transformers decoder whose attention goes through AttentionInterface.

    `column` and `row` name the linears that tensor parallelism splits by output and by input; a fused linear counts
    as what its parts are. `note` says what is particular, for the docs. `positions` names the embedding of positions
    where there is one that PEFT adapts: it looks up what the base does. Of OPT's it does not (docs/decisions.md).
    """

    model_type: str
    name: str
    column: frozenset[str]
    row: frozenset[str]
    note: str = ""
    plain_block: bool = False
    """Its layers are what `block.Block` computes."""
    positions: str = ""


_COLUMN = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
_ROW = frozenset({"o_proj", "down_proj"})

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", _COLUMN, _ROW, plain_block=True),
        Family("qwen2", "Qwen2, Qwen2.5", _COLUMN, _ROW, "sliding window where the config has one", plain_block=True),
        Family("qwen3", "Qwen3", _COLUMN, _ROW, "norms on queries and keys", plain_block=True),
        Family("mistral", "Mistral", _COLUMN, _ROW, "sliding window", plain_block=True),
        Family("gemma", "Gemma", _COLUMN, _ROW, "scaled embedding", plain_block=True),
        Family(
            "gemma2", "Gemma 2", _COLUMN, _ROW, "alternating windows, soft caps on scores and logits", plain_block=True
        ),
        Family(
            "gemma3_text", "Gemma 3 (text)", _COLUMN, _ROW, "alternating windows, a rotation for each", plain_block=True
        ),
        Family(
            "phi",
            "Phi 1, 1.5, 2",
            frozenset({"q_proj", "k_proj", "v_proj", "fc1"}),
            frozenset({"dense", "fc2"}),
            "partial rotation, attention beside the MLP",
        ),
        Family(
            "phi3",
            "Phi 3, Phi 4",
            frozenset({"qkv_proj", "gate_up_proj"}),
            _ROW,
            "fused q/k/v and gate/up, adapted as PEFT does, as one module each; sliding window; longrope",
            plain_block=True,
        ),
        Family(
            "gpt2",
            "GPT-2",
            frozenset({"c_attn", "c_fc"}),
            frozenset({"c_proj"}),
            "Conv1D; learned positions, adapted too",
            positions="wpe",
        ),
        Family(
            "opt",
            "OPT",
            frozenset({"q_proj", "k_proj", "v_proj", "fc1"}),
            frozenset({"out_proj", "fc2"}),
            "learned positions, which PEFT can not adapt",
        ),
        Family(
            "gpt_neox",
            "GPT-NeoX, Pythia",
            frozenset({"query_key_value", "dense_h_to_4h"}),
            frozenset({"dense", "dense_4h_to_h"}),
            "fused q/k/v, partial rotation",
        ),
    )
}

# Scaled at load, the same for every row of a pack; longrope is chosen by row. Dynamic NTK depends on the longest row.
_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn", "longrope"})


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
    _refuse_rope(config)
    if getattr(config, "use_bidirectional_attention", None):
        raise FailedPrecondition("use_bidirectional_attention is not served", reason="UNSUPPORTED_MODEL")
    if getattr(config, "add_cross_attention", False) or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise FailedPrecondition(
            "add_cross_attention and scale_attn_by_inverse_layer_idx are not served", reason="UNSUPPORTED_MODEL"
        )
    return family


def _refuse_rope(config: Any) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)]  # Gemma 3: one for a type of layer
    for rope in by_layer or [parameters]:
        rope_type = rope.get("rope_type", "default")
        if rope_type == "dynamic":
            raise FailedPrecondition(
                "rope_type 'dynamic' is not served: its frequencies depend on the longest row of a batch",
                reason="UNSUPPORTED_MODEL",
            )
        if rope_type not in _ROPE_TYPES or (rope_type == "longrope" and by_layer):
            raise FailedPrecondition(f"rope_type {rope_type!r} is not served here", reason="UNSUPPORTED_MODEL")


def markdown() -> str:
    """The families as a table, for the docs."""
    lines = ["| family | `model_type` | notes |", "|---|---|---|"]
    lines += [f"| {family.name} | `{family.model_type}` | {family.note} |" for family in FAMILIES.values()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
