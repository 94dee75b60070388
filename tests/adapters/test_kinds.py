"""Lowering against peft: for every module, scale * b^T a^T is peft's own delta weight; and all that must be refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from chorus.adapters import artifact, lora_fit
from chorus.adapters.artifact import Artifact
from chorus.adapters.kinds import Lowering
from chorus.adapters.lora_tensors import SortedTensors, sort_tensors
from chorus.adapters.lowered import LoweredAdapter
from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.models.sites import Site
from support.lowered import factors_of, lower

Sites = dict[str, Site]
SitesOf = Callable[[PreTrainedModel], Sites]
Export = Callable[..., Any]


def weight_of(model: PreTrainedModel) -> Callable[[str], Tensor | None]:
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return weights.get


def assert_equals_peft(lowered: LoweredAdapter, wrapped: Any, sites: Sites) -> None:
    prefix = "base_model.model."
    layers = {
        name.removeprefix(prefix): layer
        for name, layer in wrapped.named_modules()
        if isinstance(layer, LoraLayer) and name.startswith(prefix)
    }
    assert lowered.ranks.keys() == layers.keys()
    for name, factors in factors_of(lowered).items():
        layer, site = layers[name], sites[name]
        oracle = layer.get_delta_weight("default").detach()  # type: ignore[attr-defined]  # as the base stores its weight
        delta = factors.scale * (factors.b.t() @ factors.a)
        assert factors.a.is_contiguous()
        assert factors.b.is_contiguous()
        assert factors.a.shape == (layer.r["default"], site.in_features)
        assert factors.b.shape == (layer.r["default"], site.out_features)
        assert factors.scale == layer.scaling["default"]
        assert oracle.abs().max() > 1e-3  # the oracle bites
        torch.testing.assert_close(delta.t() if site.transposed or site.is_embedding else delta, oracle)


LLAMA_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 12},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "r": 7, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "r": 8,
        "rank_pattern": {"k_proj": 2, r"layers\.[01]\.mlp.up_proj": 3, "^model.layers.2.self_attn.q_proj": 5},
        "alpha_pattern": {"q_proj": 32, r".*\.2\.mlp\.up_proj": 1.5},
        "use_rslora": True,
    },
    "regex": {"target_modules": r"model\.layers\.[02]\.(self_attn|mlp)\.(q|down|o)_proj", "r": 2},
    "regex with lookahead": {"target_modules": r"^(?!.*mlp).*layers\.\d+.*_proj$", "r": 2},
    "layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2], "r": 2},
    "layers by name": {"target_modules": ["gate_proj"], "layers_to_transform": 1, "layers_pattern": "layers", "r": 2},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*", "r": 2},
    "all-linear": {"target_modules": "all-linear", "r": 3},
    "one full name": {"target_modules": ["model.layers.1.mlp.up_proj"], "r": 1},
}


@pytest.mark.parametrize("config", LLAMA_CONFIGS.values(), ids=LLAMA_CONFIGS.keys())
def test_lowered_llama_adapter_is_pefts_delta_everywhere(
    config: dict[str, Any], llama: PreTrainedModel, sites_of: SitesOf, export: Export
) -> None:
    sites = sites_of(llama)
    folder, wrapped = export(llama, **config)
    assert_equals_peft(lower(Lowering(sites, max_rank=64), artifact.read(folder)), wrapped, sites)


@pytest.mark.parametrize(
    "targets",
    [["c_attn"], "all-linear", ["attn.c_proj", "c_fc"], r".*h\.1\.mlp\.c_(fc|proj)", ["wpe", "c_fc"]],
    ids=str,
)
def test_lowered_gpt2_adapter_is_pefts_delta_everywhere(
    targets: Any, gpt2: PreTrainedModel, sites_of: SitesOf, export: Export
) -> None:
    sites = sites_of(gpt2)
    folder, wrapped = export(gpt2, target_modules=targets, r=4, rank_pattern={"c_proj": 2}, lora_alpha=3)
    assert_equals_peft(lower(Lowering(sites, max_rank=64), artifact.read(folder)), wrapped, sites)


def test_all_linear_by_hand_targets_what_peft_targets(
    llama: PreTrainedModel, sites_of: SitesOf, export: Export
) -> None:
    sites = sites_of(llama)
    folder, wrapped = export(llama, target_modules="all-linear", r=2)
    read = artifact.read(folder)  # peft has written the names out; put the shorthand back
    read = replace(read, config=read.config.model_copy(update={"target_modules": "all-linear"}))
    assert_equals_peft(lower(Lowering(sites, max_rank=64), read), wrapped, sites)


@pytest.mark.parametrize("base", ["llama", "tied_llama", "gpt2"])
def test_copy_of_the_bases_own_head_is_dropped(
    base: str, request: pytest.FixtureRequest, sites_of: SitesOf, export: Export
) -> None:
    model = request.getfixturevalue(base)
    sites, weight = sites_of(model), weight_of(model)
    folder, wrapped = export(model, target_modules=["lm_head"], r=2)
    read = artifact.read(folder)
    assert "lm_head.base_layer.weight" in read.tensors

    lowered = lower(Lowering(sites, max_rank=64, base_weight=weight), read)

    assert lowered.ranks.keys() == {"lm_head"}
    assert_equals_peft(lowered, wrapped, sites)


def test_head_copy_rounded_to_another_dtype_is_still_the_bases_own(
    llama: PreTrainedModel, sites_of: SitesOf, export: Export
) -> None:
    sites, weight = sites_of(llama), weight_of(llama)
    read = artifact.read(export(llama, target_modules=["lm_head"], r=2)[0])
    lower(Lowering(sites, max_rank=64, base_weight=lambda name: _to(weight(name), torch.bfloat16)), read)
    copy = read.tensors["lm_head.base_layer.weight"].to(torch.bfloat16)
    rounded = replace(read, tensors={**read.tensors, "lm_head.base_layer.weight": copy})
    lower(Lowering(sites, max_rank=64, base_weight=weight), rounded)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def test_head_that_is_not_the_bases_own_is_refused(llama: PreTrainedModel, sites_of: SitesOf, export: Export) -> None:
    sites, weight = sites_of(llama), weight_of(llama)
    read = artifact.read(export(llama, target_modules=["lm_head"], r=2)[0])
    for base_weight in (None, lambda name: None, lambda name: _changed(weight(name))):
        with pytest.raises(FailedPrecondition, match=r"lm_head\.base_layer\.weight") as caught:
            lower(Lowering(sites, max_rank=64, base_weight=base_weight), read)
        assert caught.value.reason == "BASE_WEIGHT_IN_FILE"


def _changed(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    tensor = tensor.clone()
    tensor[0, 0] += 1e-3
    return tensor


def test_head_without_a_copy_needs_no_comparison(llama: PreTrainedModel, sites_of: SitesOf, export: Export) -> None:
    sites = sites_of(llama)
    folder, wrapped = export(llama, target_modules=["lm_head", "q_proj"], r=2, save_embedding_layers=False)
    assert_equals_peft(lower(Lowering(sites, max_rank=64), artifact.read(folder)), wrapped, sites)


def test_lora_on_the_embedding_equals_peft(llama: PreTrainedModel, sites_of: SitesOf, export: Export) -> None:
    sites = sites_of(llama)
    weights = weight_of(llama)
    folder, wrapped = export(llama, target_modules=["embed_tokens", "q_proj"], r=2, lora_alpha=7)
    lowered = lower(Lowering(sites, max_rank=64, base_weight=weights), artifact.read(folder))
    assert_equals_peft(lowered, wrapped, sites)


def test_the_scale_of_an_embedding_is_the_deltas_too(llama: PreTrainedModel, sites_of: SitesOf, export: Export) -> None:
    sites = sites_of(llama)
    [name] = [name for name, site in sites.items() if site.is_embedding]
    read = artifact.read(export(llama, target_modules=["embed_tokens"], r=2, save_embedding_layers=False)[0])
    scaled = {**sites, name: replace(sites[name], scale=3.0)}
    once, thrice = (lower(Lowering(s, max_rank=64), read).scales[name] for s in (sites, scaled))
    assert thrice == 3 * once


def test_lora_on_an_embedding_does_not_fit_a_linear(llama: PreTrainedModel, sites_of: SitesOf, export: Export) -> None:
    sites = sites_of(llama)
    [name] = [name for name, site in sites.items() if site.is_embedding]
    read = artifact.read(export(llama, target_modules=["embed_tokens"], r=2, save_embedding_layers=False)[0])
    with pytest.raises(FailedPrecondition, match="is a linear in this base") as caught:
        lower(Lowering({**sites, name: replace(sites[name], is_embedding=False)}, max_rank=64), read)
    assert caught.value.reason == "UNKNOWN_MODULE"


# One sound adapter on one base, and one fault at a time


@pytest.fixture
def sites() -> Sites:
    return {name: Site(name, 8, 6) for name in ("layers.0.q_proj", "layers.1.q_proj", "layers.0.v_proj")}


def make(sites: Sites, *, rank: int = 2, targets: Any = ("q_proj",), **config: Any) -> Artifact:
    from chorus.adapters.lora_config import parse_config

    raw = {"peft_type": "LORA", "target_modules": list(targets), "r": rank, **config}
    tensors = {}
    for name in sites:
        if name.endswith("q_proj"):
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 8)
            tensors[f"{name}.lora_B.weight"] = torch.randn(6, rank)
    return Artifact(parse_config(raw), tensors, None, 0)


def changed(made: Artifact, **tensors: Tensor | None) -> Artifact:
    """The artifact with tensors replaced (None: removed), named with _ for dots and q for q_proj."""
    result = dict(made.tensors)
    for key, tensor in tensors.items():
        layer, module, part = key.split("_", 2)
        name = f"layers.{layer[1:]}.{module}_proj.{part.replace('_weight', '.weight')}"
        if tensor is None:
            del result[name]
        else:
            result[name] = tensor
    return replace(made, tensors=result)


def test_sound_adapter_is_counted(sites: Sites) -> None:
    lowered = lower(Lowering(sites, max_rank=2), make(sites))
    assert (lowered.kind, lowered.max_rank, lowered.site_count) == ("LORA", 2, 2)
    assert lowered.bytes == 4 * 2 * 2 * (8 + 6)
    assert list(lowered.ranks) == ["layers.0.q_proj", "layers.1.q_proj"]


def test_a_recipe_is_looked_at_once_unless_it_is_large(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []

    def look(shapes: Any) -> SortedTensors:
        looked.append(shapes)
        return sort_tensors(shapes)

    monkeypatch.setattr(lora_fit, "sort_tensors", look)
    lowering = Lowering(sites, max_rank=2)
    for _ in range(3):
        lowering.fit(make(sites))
    assert len(looked) == 1
    for _ in range(2):
        lowering.fit(make(sites, targets=["q_proj", *(f"{i:0500}" for i in range(40))]))
    assert len(looked) == 3
    monkeypatch.setattr(lora_fit, "_KEPT_TENSORS", 3)
    lowering.fit(make(sites))
    assert len(looked) == 4


def test_second_adapter_of_a_recipe_is_lowered_from_its_own_numbers(sites: Sites) -> None:
    lowering = Lowering(sites, max_rank=2)
    for made in (make(sites), make(sites)):
        lowered = lower(lowering, made)
        for name, factors in factors_of(lowered).items():
            assert torch.equal(factors.a, made.tensors[f"{name}.lora_A.weight"])
            assert torch.equal(factors.b, made.tensors[f"{name}.lora_B.weight"].mT)


def test_what_differs_from_a_remembered_recipe_is_looked_at(sites: Sites) -> None:
    lowering, made = Lowering(sites, max_rank=2), make(sites)
    assert lower(lowering, made).scales["layers.0.q_proj"] == 4
    assert lower(lowering, make(sites, lora_alpha=2)).scales["layers.0.q_proj"] == 1
    for other in (
        changed(made, l0_q_lora_B_weight=torch.randn(6, 3)),
        changed(made, l0_q_lora_A_weight=None, l0_q_lora_B_weight=None),
        make(sites, targets=["v_proj"]),
        make(sites, rank=4),
    ):
        with pytest.raises((InvalidArgument, FailedPrecondition)):
            lower(lowering, other)
    lower(lowering, made)


def test_factors_do_not_keep_the_file_in_memory(sites: Sites) -> None:
    made = make(sites)
    lowered = lower(Lowering(sites, max_rank=2), made)
    files = {tensor.untyped_storage().data_ptr() for tensor in made.tensors.values()}
    for factors in factors_of(lowered).values():
        assert not files & {factors.a.untyped_storage().data_ptr(), factors.b.untyped_storage().data_ptr()}


def refused(
    kind: type[InvalidArgument | FailedPrecondition], reason: str, names: str, made: Artifact, sites: Sites
) -> None:
    with pytest.raises(kind) as caught:
        lower(Lowering(sites, max_rank=4), made)
    assert caught.value.reason == reason
    assert names in caught.value.message


def test_half_a_pair_is_an_incomplete_file(sites: Sites) -> None:
    for gone, left in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        made = changed(make(sites), **{f"l1_q_{gone}_weight": None})
        assert any(left in name for name in made.tensors)
        refused(InvalidArgument, "INCOMPLETE_FILE", f"layers.1.q_proj.{gone}.weight", made, sites)


def test_targeted_site_without_tensors_is_another_base(sites: Sites) -> None:
    made = changed(make(sites), l1_q_lora_A_weight=None, l1_q_lora_B_weight=None)
    refused(FailedPrecondition, "MISSING_TENSOR", "layers.1.q_proj", made, sites)


def test_module_that_the_base_lacks_is_named(sites: Sites) -> None:
    made = changed(make(sites), l7_q_lora_A_weight=torch.ones(2, 8), l7_q_lora_B_weight=torch.ones(6, 2))
    refused(FailedPrecondition, "UNKNOWN_MODULE", "layers.7.q_proj", made, sites)


def test_tensor_that_the_config_does_not_target_is_named(sites: Sites) -> None:
    made = changed(make(sites), l0_v_lora_A_weight=torch.ones(2, 8), l0_v_lora_B_weight=torch.ones(6, 2))
    refused(FailedPrecondition, "UNTARGETED_TENSOR", "layers.0.v_proj", made, sites)


@pytest.mark.parametrize(
    ("name", "reason", "says"),
    [
        ("layers.0.q_proj.lora_C.weight", "UNKNOWN_TENSOR", "plain LoRA"),
        ("layers.0.q_proj.lora_A.default.weight", "UNKNOWN_TENSOR", "plain LoRA"),
        ("layers.0.q_proj.lora_magnitude_vector", "UNSUPPORTED_TENSOR", "DoRA"),
        ("layers.0.q_proj.lora_B.bias", "UNSUPPORTED_TENSOR", "bias"),
        ("layers.0.q_proj.base_layer.bias", "BASE_WEIGHT_IN_FILE", "bias"),
        ("score.weight", "UNKNOWN_TENSOR", "plain LoRA"),
    ],
)
def test_tensor_that_plain_lora_lacks_is_named(name: str, reason: str, says: str, sites: Sites) -> None:
    made = make(sites)
    made = replace(made, tensors={**made.tensors, name: torch.ones(2)})
    refused(FailedPrecondition, reason, name, made, sites)
    refused(FailedPrecondition, reason, says, made, sites)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("shape", [(3, 5), (2,), (2, 8, 1), (0, 0), ()], ids=str)
def test_shape_that_does_not_fit_the_site_is_another_base(part: str, shape: tuple[int, ...], sites: Sites) -> None:
    made = changed(make(sites), **{f"l0_q_{part}_weight": torch.ones(shape)})
    expected = [2, 8] if part == "lora_A" else [6, 2]
    refused(FailedPrecondition, "SHAPE_MISMATCH", f"expected shape {expected}, got {list(shape)}", made, sites)


def test_rank_unlike_the_configs_is_a_contradiction(sites: Sites) -> None:
    made = changed(make(sites), l0_q_lora_A_weight=torch.ones(3, 8), l0_q_lora_B_weight=torch.ones(6, 3))
    refused(InvalidArgument, "RANK_MISMATCH", "rank 2", made, sites)
    made = changed(make(sites), l0_q_lora_B_weight=torch.ones(6, 3))
    refused(InvalidArgument, "RANK_MISMATCH", "layers.0.q_proj.lora_B.weight", made, sites)
    refused(InvalidArgument, "RANK_MISMATCH", "rank 3", make(sites, rank_pattern={"layers.1.q_proj": 3}), sites)


def test_rank_over_the_limit_names_the_limit(sites: Sites) -> None:
    refused(FailedPrecondition, "RANK_OVER_LIMIT", "limit of 4", make(sites, rank=5), sites)


def test_adapter_that_touches_nothing_is_refused(sites: Sites) -> None:
    made = replace(make(sites, targets=["nothing_proj"]), tensors={})
    refused(FailedPrecondition, "NOTHING_TARGETED", "nothing_proj", made, sites)
    refused(
        FailedPrecondition, "NOTHING_TARGETED", "target_modules", replace(make(sites, targets=[]), tensors={}), sites
    )


def test_entry_that_matches_nothing_beside_one_that_does_passes_as_in_peft(sites: Sites) -> None:
    assert lower(Lowering(sites, max_rank=4), make(sites, targets=["q_proj", "nothing_proj"])).site_count == 2
