"""Configs: whatever peft writes with features off passes, and every feature that is not served is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.adapters.lora_config import LoraConfig, parse_config
from chorus.adapters.strict_json import parse_object
from chorus.errors import FailedPrecondition, InvalidArgument


def saved(folder: Path, **fields: Any) -> dict[str, Any]:
    """The JSON that peft writes for these fields."""
    peft.LoraConfig(**fields).save_pretrained(str(folder))
    raw: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return raw


def minimal(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "target_modules": ["q_proj"], **fields}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 16, "lora_alpha": 32, "use_rslora": True, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ["lm_head"], "fan_in_fan_out": True},
        {"layers_to_transform": [0, 2], "layers_pattern": "layers", "rank_pattern": {"q_proj": 4}},
        {"layers_to_transform": 1, "alpha_pattern": {"^model.layers.0.q_proj": 2.5}, "init_lora_weights": "gaussian"},
        {
            "init_lora_weights": "eva",
            "eva_config": peft.EvaConfig(),
            "base_model_name_or_path": "x/y",
            "revision": "main",
        },
        {"init_lora_weights": "orthogonal", "inference_mode": True},
    ],
    ids=str,
)
def test_what_peft_writes_is_read_back(fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "v_proj"], **fields}
    config = parse_config(saved(tmp_path, **fields))
    oracle = peft.LoraConfig(**fields)
    assert (config.r, config.lora_alpha, config.use_rslora) == (oracle.r, oracle.lora_alpha, oracle.use_rslora)
    assert (config.rank_pattern, config.alpha_pattern) == (oracle.rank_pattern, oracle.alpha_pattern)
    targets = config.target_modules
    assert (targets if isinstance(targets, str) else set(targets)) == oracle.target_modules


def test_absent_fields_mean_what_they_mean_in_peft() -> None:
    config, oracle = parse_config(minimal()), peft.LoraConfig()
    assert (config.r, config.lora_alpha, config.use_rslora) == (oracle.r, oracle.lora_alpha, oracle.use_rslora)


REFUSED: dict[str, Any] = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "lora_only",
    "modules_to_save": ["classifier"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 2]],
    "target_parameters": ["experts.gate_up_proj"],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "megatron_config": {"a": 1},
    "ensure_weight_tying": True,
    "velora_config": {"rank": 1},
    "monteclora_config": {"x": 1},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 0.1},
    "auto_map": {"AutoModel": "evil.Model"},
    "field_of_the_future": 0,
    "another": "x",
}


@pytest.mark.parametrize(("field", "value"), REFUSED.items(), ids=REFUSED.keys())
def test_field_that_is_not_served_is_refused_by_name_and_value(field: str, value: Any) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        parse_config(minimal(**{field: value}))
    assert caught.value.reason == "UNSUPPORTED_FIELD"
    assert caught.value.violations[0].field == field
    assert f"{field} = {json.dumps(value)}"[:60] in caught.value.message.replace("'", '"')


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq", "unheard_of"]
)
def test_unconverted_initialisation_is_refused_by_name(init: str) -> None:
    with pytest.raises(FailedPrecondition, match=init):
        parse_config(minimal(init_lora_weights=init))


def test_every_field_of_pefts_config_was_considered() -> None:
    known = set(LoraConfig.model_fields) | REFUSED.keys()
    from chorus.adapters.lora_config import _IGNORED

    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known | _IGNORED


def test_features_that_are_off_pass_whatever_they_are() -> None:
    parse_config(minimal(use_dora=False, lora_bias=None, feature_of_the_future={}, another="", third=[]))


@pytest.mark.parametrize("kind", ["IA3", "VERA", "PROMPT_TUNING", "lora", ""])
def test_other_kind_is_a_precondition(kind: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        parse_config({"peft_type": kind})
    assert caught.value.reason == "UNSUPPORTED_KIND"


WRONG: list[dict[str, Any]] = [
    {"peft_type": None},
    {"peft_type": ["LORA"]},
    {"r": 0},
    {"r": -8},
    {"r": 8.0},
    {"r": True},
    {"r": "8"},
    {"r": None},
    {"r": 10**30},
    {"lora_alpha": float("inf")},
    {"lora_alpha": float("nan")},
    {"lora_alpha": 10**400},
    {"lora_alpha": True},
    {"lora_alpha": "16"},
    {"use_rslora": 1},
    {"use_rslora": "true"},
    {"target_modules": [1]},
    {"target_modules": 3},
    {"target_modules": {"q_proj": 1}},
    {"target_modules": ["x" * 513]},
    {"target_modules": ["\ud800"]},
    {"target_modules": "x" * 5000},
    {"rank_pattern": ["q_proj"]},
    {"rank_pattern": {"q_proj": 0}},
    {"rank_pattern": {"q_proj": 1.5}},
    {"alpha_pattern": {"q_proj": float("inf")}},
    {"layers_to_transform": [True]},
    {"layers_to_transform": "0"},
    {"layers_to_transform": [-1]},
    {"layers_pattern": "layers"},
    {"layers_pattern": 3, "layers_to_transform": [0]},
    {"target_modules": ".*", "layers_to_transform": [0]},
    {"bias": "some"},
    {"bias": True},
    {"lora_dropout": "none"},
    {"init_lora_weights": 3},
]


@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_wrong_type_or_value_is_invalid_and_named(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_config(minimal(**fields))
    assert caught.value.violations
    assert len(caught.value.message) < 600


def test_null_targets_are_refused_as_unknown_defaults() -> None:
    with pytest.raises(FailedPrecondition, match="target_modules"):
        parse_config(minimal(target_modules=None))


def test_layers_pattern_takes_plain_names_only() -> None:
    with pytest.raises(FailedPrecondition, match="layers_pattern"):
        parse_config(minimal(layers_to_transform=[0], layers_pattern="(a*)*"))


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"nonsense", b'{"r": 1, "r": 2}', b'{"r": NaN}', b'{"r": Infinity}', b"\xff", b'{"a":' * 90_000],
)
def test_malformed_json_is_invalid(text: bytes) -> None:
    with pytest.raises(InvalidArgument):
        parse_object(text, "adapter_config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=6,
)
FIELDS = st.sampled_from([*LoraConfig.model_fields, *REFUSED, "auto_mapping", "new"]) | st.text(max_size=100)


@given(raw=st.dictionaries(FIELDS, JSON, max_size=6), whole=st.booleans())
def test_any_json_gives_a_config_or_a_typed_error(raw: dict[str, Any], whole: bool) -> None:
    message = ""
    try:
        parse_config(minimal(**raw) if whole else raw)
    except (InvalidArgument, FailedPrecondition) as error:
        message = error.message
    assert len(message) < 2000
    assert message.isascii()
