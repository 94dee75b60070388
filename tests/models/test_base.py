"""Loading a base: from a folder, from the (faked) hub, dummy weights; what can not be served is refused by name."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from chorus.errors import ChorusError, FailedPrecondition, InvalidArgument, NotFound
from chorus.models.base import load_base
from chorus.models.digest import base_digest
from chorus.models.families import family_of
from support.tiny import FAMILIES, save_base


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("llama"), "llama")


def edited(folder: Path, into: Path, **changes: object) -> Path:
    """A copy whose config.json has other values."""
    shutil.copytree(folder, into)
    config = json.loads((into / "config.json").read_text())
    (into / "config.json").write_text(json.dumps({**config, **changes}))
    return into


def test_facts_and_sites_are_the_models_own(llama: Path) -> None:
    base = load_base(str(llama), device="cpu", dtype="float32")
    assert base.facts.context_length == 256
    assert base.facts.eos_token_ids == {2}
    assert base.tokenizer is None
    site = base.sites["model.layers.2.mlp.down_proj"]
    assert (site.in_features, site.out_features, site.shard) == (112, 64, "row")
    assert base.sites["lm_head"].is_lm_head
    assert base.sites["model.embed_tokens"].is_embedding
    assert len(base.sites) == 3 * 7 + 2
    assert base.facts.parameter_count == sum(p.numel() for p in base.module.parameters())


def test_a_hub_id_is_fetched_and_only_data_is_asked_for(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def snapshot(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.extend([repo_id, *allow_patterns])
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load_base("org/model", device="cpu", dtype="float32").facts.name == "org/model"
    assert asked[0] == "org/model"
    assert not any(str(pattern).endswith((".py", ".bin")) for pattern in asked)


def test_a_hub_that_fails_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repo_id: str, **_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(NotFound, match=r"org/model.* give a folder's path, or a hub id that this machine can reach"):
        load_base("org/model", device="cpu", dtype="float32")


def test_dummy_weights_need_a_config_alone_and_are_the_same_each_time(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    first, second = (load_base(str(tmp_path), device="cpu", dtype="bfloat16", load_format="dummy") for _ in range(2))
    assert first.dtype == torch.bfloat16
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_digest_knows_weights_and_config_but_not_who_wrote_them(llama: Path, tmp_path: Path) -> None:
    digest = base_digest(llama)
    assert base_digest(edited(llama, tmp_path / "a", transformers_version="0.0", _name_or_path="/x")) == digest
    assert base_digest(edited(llama, tmp_path / "b", rms_norm_eps=1e-3)) != digest
    changed = edited(llama, tmp_path / "c")
    weights = changed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert base_digest(changed) != digest


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "bloom"}, "bloom"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    llama: Path, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    with pytest.raises(FailedPrecondition, match=named):
        load_base(str(edited(llama, tmp_path / "m", **changes)), device="cpu", dtype="float32")


def test_folders_that_hold_no_model_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no folder"):
        load_base("/no/such/folder", device="cpu", dtype="float32")
    with pytest.raises(InvalidArgument, match=r"config\.json"):
        load_base(str(tmp_path), device="cpu", dtype="float32")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match="it is an adapter: serve its base, and push it"):
        load_base(str(tmp_path), device="cpu", dtype="float32")
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(InvalidArgument, match="safetensors"):
        load_base(str(tmp_path), device="cpu", dtype="float32")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InvalidArgument, match="safetensors"):
        load_base(str(tmp_path), device="cpu", dtype="float32")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ChorusError):
        load_base(str(tmp_path), device="cpu", dtype="float32")


def test_weights_that_do_not_fit_the_config_are_refused(llama: Path, tmp_path: Path) -> None:
    """transformers would fill what is missing with random numbers."""
    with pytest.raises(InvalidArgument):
        load_base(str(edited(llama, tmp_path / "a", intermediate_size=128)), device="cpu", dtype="float32")
    with pytest.raises(InvalidArgument, match="layers"):
        load_base(str(edited(llama, tmp_path / "b", num_hidden_layers=4)), device="cpu", dtype="float32")


@pytest.mark.parametrize("family", ["llama-tied-bias", "gpt2"])
def test_a_checkpoint_does_not_stay_mapped_beside_the_packed_weights(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(FAMILIES[family]), dtype=torch.bfloat16
    )  # it keeps the dtype
    model.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), device="cpu", dtype="bfloat16")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    saved = dict(model.named_parameters())
    kept = {name: p for name, p in base.module.named_parameters() if p.numel() and name in saved}
    assert any("norm" in name or "ln_" in name for name in kept)
    assert all(torch.equal(parameter, saved[name]) for name, parameter in kept.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_said(llama: Path) -> None:
    with pytest.raises(FailedPrecondition, match="cuda"):
        load_base(str(llama), device="cuda", dtype="float32")


def test_longrope_for_some_layers_only_is_refused() -> None:
    rope = {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(FailedPrecondition, match="longrope"):
        family_of(SimpleNamespace(model_type="gemma3_text", rope_parameters=rope))
