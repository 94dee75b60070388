"""The digest changes with what the adapter computes, and with nothing else."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chorus.adapters import artifact
from chorus.adapters.artifact import Artifact, TaskCard
from chorus.adapters.digest import read_verified, version_digest
from chorus.adapters.lora_config import parse_config
from chorus.errors import DataLoss

BASE = "0" * 64


def make(tensors: dict[str, torch.Tensor] | None = None, task: TaskCard | None = None, **config: Any) -> Artifact:
    if tensors is None:
        tensors = {"q.lora_A.weight": torch.arange(4.0).view(1, 4), "q.lora_B.weight": torch.ones(4, 1)}
    raw = {"peft_type": "LORA", "target_modules": ["q"], "r": 1, **config}
    return Artifact(parse_config(raw), tensors, task, 0)


def test_digest_is_the_documented_stream_of_bytes() -> None:
    config = (
        '{"base":"' + BASE + '","config":{"alpha_pattern":[],"exclude_modules":[],"layers_pattern":[],'
        '"layers_to_transform":[],"lora_alpha":8.0,"peft_type":"LORA","r":1,"rank_pattern":[],"target_modules":["q"],'
        '"use_rslora":false},"task":null}\n'
    )
    stream = (
        config.encode()
        + b'["q.lora_A.weight","F32",[1,4]]\n'
        + bytes.fromhex("00000000 0000803f 00000040 00004040")
        + b'["q.lora_B.weight","F32",[4,1]]\n'
        + bytes.fromhex("0000803f" * 4)
    )
    assert version_digest(make(), BASE) == hashlib.sha256(stream).hexdigest()


def test_large_tensors_and_odd_names_are_in_the_stream_as_documented() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {'a "quoted" \\ name': 70_000, "caf\u00e9 \U0001f600\n": 10, "empty": 0, "large": 200_000, "last": 1}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    made = make(tensors)
    head = {"base": BASE, "config": made.config.identity(), "task": None}
    oracle = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    for name in sorted(tensors):
        oracle.update(json.dumps([name, "F32", [sizes[name]]], separators=(",", ":")).encode() + b"\n")
        oracle.update(tensors[name].numpy().tobytes())
    assert version_digest(made, BASE) == oracle.hexdigest()


@pytest.mark.parametrize(
    "config",
    [
        {"base_model_name_or_path": "elsewhere"},
        {"peft_version": "0.1"},
        {"inference_mode": True},
        {"lora_dropout": 0.5},
        {"init_lora_weights": "gaussian"},
        {"fan_in_fan_out": True},
        {"target_modules": ["q", "q"]},
        {"lora_alpha": 8},
        {"layers_to_transform": []},
    ],
    ids=str,
)
def test_field_that_changes_no_answer_does_not_count(config: dict[str, Any]) -> None:
    assert version_digest(make(**config), BASE) == version_digest(make(), BASE)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 2},
        {"lora_alpha": 9},
        {"use_rslora": True},
        {"target_modules": ["q", "v"]},
        {"target_modules": "q"},
        {"exclude_modules": ["v"]},
        {"rank_pattern": {"q": 1}},
        {"alpha_pattern": {"q": 1}},
        {"layers_to_transform": [0]},
    ],
    ids=str,
)
def test_field_that_may_change_an_answer_counts(config: dict[str, Any]) -> None:
    assert version_digest(make(**config), BASE) != version_digest(make(), BASE)


def test_order_of_patterns_counts_because_the_first_match_wins() -> None:
    one = make(alpha_pattern={"q": 1, ".*": 2})
    other = make(alpha_pattern={".*": 2, "q": 1})
    assert version_digest(one, BASE) != version_digest(other, BASE)


def test_tensor_bytes_names_dtypes_shapes_and_base_count_but_not_their_order() -> None:
    a, b = torch.arange(4.0).view(1, 4), torch.ones(4, 1)
    same = version_digest(make({"q.lora_B.weight": b, "q.lora_A.weight": a}), BASE)
    assert same == version_digest(make(), BASE)
    digests = {
        same,
        version_digest(make(), "1" * 64),
        version_digest(make({"q.lora_A.weight": a + 1e-6, "q.lora_B.weight": b}), BASE),
        version_digest(make({"v.lora_A.weight": a, "q.lora_B.weight": b}), BASE),
        version_digest(make({"q.lora_A.weight": a.view(4, 1), "q.lora_B.weight": b}), BASE),
        version_digest(make({"q.lora_A.weight": a.to(torch.float16), "q.lora_B.weight": b}), BASE),
        version_digest(make({"q.lora_A.weight": a.to(torch.bfloat16), "q.lora_B.weight": b}), BASE),
    }
    assert len(digests) == 7


def test_what_serving_reads_of_the_task_card_counts_and_its_notes_do_not() -> None:
    card = TaskCard(task="t", prompt_template="{x}", metrics={"loss": 1.0}, trainer_version="1")
    plain = version_digest(make(task=card), BASE)
    assert plain != version_digest(make(), BASE)
    assert plain != version_digest(make(task=card.model_copy(update={"prompt_template": "{y}"})), BASE)
    assert plain == version_digest(make(task=card.model_copy(update={"metrics": {}, "trainer_version": "2"})), BASE)


def test_views_that_are_not_contiguous_hash_as_their_values() -> None:
    made = make()
    strided = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in made.tensors.items()}
    assert version_digest(replace(made, tensors=strided), BASE) == version_digest(made, BASE)


def test_strange_strings_have_a_digest() -> None:
    assert len(version_digest(make(target_modules=["q", "é\0"]), BASE)) == 64


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q"], "r": 1}))
    tensors = {
        "base_model.model.q.lora_A.weight": torch.ones(1, 4),
        "base_model.model.q.lora_B.weight": torch.ones(4, 1),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_stored_version_that_still_matches_is_read(stored: Path) -> None:
    digest = version_digest(artifact.read(stored), BASE)
    assert read_verified(stored, digest=digest, base_digest=BASE).tensors.keys() == {
        "q.lora_A.weight",
        "q.lora_B.weight",
    }


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "config"])
def test_stored_version_that_changed_is_data_loss(damage: str, stored: Path) -> None:
    digest = version_digest(artifact.read(stored), BASE)
    path = stored / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-4])
    elif damage == "remove":
        path.unlink()
    else:
        (stored / "adapter_config.json").write_text("{}")
    with pytest.raises(DataLoss, match=digest) as caught:
        read_verified(stored, digest=digest, base_digest=BASE)
    assert str(stored) not in caught.value.message
