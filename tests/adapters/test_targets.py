"""Targeting against peft's own functions as the oracle."""

import math
import time
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from chorus.adapters.lora_config import parse_config
from chorus.adapters.targets import Targets
from chorus.errors import FailedPrecondition
from chorus.models.sites import Site

SEGMENTS = [
    "model",
    "layers",
    "h",
    "0",
    "1",
    "2",
    "13",
    "self_attn",
    "mlp",
    "q_proj",
    "v_proj",
    "up_proj",
    "experts",
    "lm_head",
]
NAMES = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=7).map(".".join)
REGEXES = st.sampled_from(
    [
        r".*q_proj",
        r".*\.(q|v)_proj",
        r"model\.layers\.[01]\..*",
        r".*",
        "lm_head",
        r".*layers\.\d+\.mlp.*",
        "",
        "q_proj",
        r"(?!.*mlp).*",
        r"(?:q_proj|.*\.up_proj)",
    ]
)
KEYS = (
    NAMES
    | st.sampled_from(
        [r".*\.0\..*", r"^model.layers.0.mlp.up_proj", r"(q|v)_proj", r"layers\.[01]\.mlp\.up_proj", "a)|(model"]
    )
    | st.sampled_from(["_proj", r"\d+", "self_attn.q_proj", "^q_proj", "q_proj$", r"layers\.\d+\.self_attn.v_proj"])
)
CHOICE = st.lists(NAMES, max_size=4) | REGEXES
LAYERS = st.none() | st.integers(0, 3) | st.lists(st.integers(0, 14), max_size=3)
LAYER_NAMES = (
    st.none()
    | st.sampled_from(["layers", "h", "experts", "self_attn", ""])
    | st.lists(st.sampled_from(["h", "layers"]))
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    targets = draw(CHOICE)
    layers = None if isinstance(targets, str) else draw(LAYERS)
    return {
        "target_modules": targets,
        "exclude_modules": draw(st.none() | CHOICE),
        "layers_to_transform": layers,
        "layers_pattern": None if layers in (None, []) else draw(LAYER_NAMES),
        "r": 8,
        "lora_alpha": 3,
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(KEYS, st.integers(1, 64), max_size=3)),
        "alpha_pattern": draw(st.dictionaries(KEYS, st.integers(-9, 9) | st.floats(-4, 4), max_size=3)),
    }


def patterned(values: Any, name: str, default: float) -> float:
    """As peft's `LoraModel._create_and_replace` does it."""
    found: float = values.get(get_pattern_key(values.keys(), name), default)
    return found


@settings(max_examples=400, deadline=None)
@given(fields=configs(), names=st.lists(NAMES, min_size=1, max_size=6))
def test_targets_ranks_and_scales_are_pefts(fields: dict[str, Any], names: list[str]) -> None:
    oracle = peft.LoraConfig(**fields)
    targets = Targets(parse_config({"peft_type": "LORA", **fields}), [])
    for name in names:
        found = check_target_module_exists(oracle, name)
        assert targets.matches(name) is (bool(found) and type(found).__name__ != "_ExcludedModule")
        rank = patterned(oracle.rank_pattern, name, oracle.r)
        alpha = patterned(oracle.alpha_pattern, name, oracle.lora_alpha)
        assert targets.rank(name) == rank
        assert targets.scale(name) == alpha / (math.sqrt(rank) if oracle.use_rslora else rank)


@pytest.mark.parametrize("spelling", ["all-linear", "All-Linear"])
def test_all_linear_is_every_site_but_the_head(spelling: str) -> None:
    sites = [Site("model.layers.0.q_proj", 4, 4), Site("lm_head", 4, 9, is_lm_head=True)]
    targets = Targets(parse_config({"peft_type": "LORA", "target_modules": spelling}), sites)
    assert [site.name for site in sites if targets.matches(site.name)] == ["model.layers.0.q_proj"]


@pytest.mark.parametrize("key", ["x" * 400, "(x|y)" * 80], ids=["plain", "regex"])
def test_file_full_of_patterns_is_refused_within_seconds(key: str) -> None:
    patterns = {f"{key}{index}": 1 for index in range(8192)}
    config = parse_config({"peft_type": "LORA", "target_modules": ["q"], "rank_pattern": patterns})
    start = time.thread_time()
    with pytest.raises(FailedPrecondition, match="rank_pattern"):
        Targets(config, [])
    assert time.thread_time() - start < 10


def test_thousands_of_literal_patterns_stay_cheap() -> None:
    names = [f"model.layers.{layer}.mlp.p{module}" for layer in range(120) for module in range(7)]
    config = parse_config(
        {
            "peft_type": "LORA",
            "target_modules": names,
            "rank_pattern": {name: 1 + at % 64 for at, name in enumerate(names)},
        }
    )
    targets = Targets(config, [])
    assert all(targets.matches(name) and targets.rank(name) == 1 + at % 64 for at, name in enumerate(names))
