"""Reading adapter folders: peft's own pass, everything unsound is refused and nothing outside is opened."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from chorus.adapters import artifact
from chorus.adapters.artifact import Artifact, check_base, check_file_name
from chorus.errors import FailedPrecondition, InvalidArgument

DIGEST = "ab" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small sound adapter."""
    made = tmp_path / "sound"
    made.mkdir()
    (made / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q"], "r": 2}))
    save_file(tensors(), made / "adapter_model.safetensors")
    return made


def tensors() -> dict[str, torch.Tensor]:
    return {
        "base_model.model.q.lora_A.weight": torch.ones(2, 4),
        "base_model.model.q.lora_B.weight": torch.ones(4, 2),
    }


def test_what_peft_saved_is_read(llama: PreTrainedModel, export: Callable[..., Any]) -> None:
    saved, _ = export(llama, target_modules=["q_proj"], r=4)
    assert (saved / "README.md").exists()
    read = artifact.read(saved)
    stored = load_file(saved / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in read.tensors} == stored.keys()
    assert read.size_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert read.config.r == 4
    assert read.task is None


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(InvalidArgument, match=name):
        artifact.read(folder)


def test_missing_folder_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no such adapter folder"):
        artifact.read(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "task.json", "notes.txt"])
def test_symlink_is_refused_even_to_a_sound_file(name: str, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    if (folder / name).exists():
        shutil.move(folder / name, target)
    else:
        target.write_text("{}")
    (folder / name).symlink_to(target)
    with pytest.raises(InvalidArgument, match=name) as caught:
        artifact.read(folder)
    assert caught.value.reason == "NOT_A_REGULAR_FILE"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensor_that_is_not_finite_is_named(bad: float, dtype: torch.dtype, folder: Path) -> None:
    changed = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    changed["base_model.model.q.lora_B.weight"][3, 1] = bad
    save_file(changed, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidArgument, match=r"q\.lora_B\.weight") as caught:
        artifact.read(folder)
    assert caught.value.reason == "NOT_FINITE"


def test_key_without_pefts_prefix_is_refused(folder: Path) -> None:
    save_file({"q.lora_A.weight": torch.ones(2, 4)}, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidArgument, match=r"q\.lora_A\.weight"):
        artifact.read(folder)


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the canary sang",))


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "ckpt", "BIN"])
def test_weights_as_a_pickle_are_refused_unopened(suffix: str, folder: Path) -> None:
    (folder / f"adapter_model.{suffix}").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(InvalidArgument) as caught:
        artifact.read(folder)
    assert caught.value.reason == "PICKLE_REFUSED"


def test_pickle_under_a_safetensors_name_is_refused_unopened(folder: Path) -> None:
    torch.save({"x": Canary()}, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidArgument) as caught:
        artifact.read(folder)
    assert caught.value.reason == "PICKLE_REFUSED"


def test_huge_json_is_refused_unparsed(folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(b" " * (artifact.JSON_LIMIT + 1))
    with pytest.raises(InvalidArgument) as caught:
        artifact.read(folder)
    assert caught.value.reason == "FILE_TOO_LARGE"


@pytest.mark.parametrize("name", artifact.FILE_NAMES)
def test_names_of_the_three_files_pass(name: str) -> None:
    assert check_file_name(name) == name


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.PT", "a/b.pkl", "optimizer.pt"])
def test_name_of_a_pickle_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_file_name(name)
    assert caught.value.reason == "PICKLE_REFUSED"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../task.json",
        "/etc/passwd",
        "x/task.json",
        "task.json\0",
        "TASK.JSON",
        "README.md",
        "a" * 10_000,
        "t\u0430sk.json",
    ],
)
def test_other_name_is_refused_without_being_echoed_whole(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_file_name(name)
    assert len(caught.value.message) < 300
    assert caught.value.message.isprintable()


def with_card(folder: Path, **fields: Any) -> Artifact:
    (folder / "task.json").write_text(json.dumps(fields))
    return artifact.read(folder)


def test_task_card_is_read_and_unknown_fields_are_left_alone(folder: Path) -> None:
    card = with_card(
        folder,
        task="routing",
        labels=["a", "b"],
        prompt_template="{text} ->",
        base_digest=DIGEST,
        max_length=64,
        metrics={"validation_loss": 0.25, "steps": 100},
        note_of_a_newer_trainer={"x": 1},
    ).task
    assert card is not None
    assert (card.task, card.labels, card.max_length) == ("routing", ("a", "b"), 64)
    assert card.metrics == {"validation_loss": 0.25, "steps": 100.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"task": 3},
        {"labels": "abc"},
        {"labels": [1]},
        {"base_digest": "xyz"},
        {"max_length": 0},
        {"metrics": {"a": "1"}},
    ],
    ids=str,
)
def test_wrong_task_card_is_invalid_and_named(fields: dict[str, Any], folder: Path) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(fields))):
        with_card(folder, **fields)


def test_task_card_of_a_newer_format_is_refused(folder: Path) -> None:
    with pytest.raises(FailedPrecondition, match="format_version 2"):
        with_card(folder, format_version=2)


def test_card_made_for_another_base_is_refused(folder: Path) -> None:
    made = with_card(folder, base_digest=DIGEST)
    check_base(made, DIGEST)
    with pytest.raises(FailedPrecondition) as caught:
        check_base(made, "cd" * 32)
    assert caught.value.reason == "BASE_MISMATCH"


def test_without_a_card_shapes_decide(folder: Path) -> None:
    check_base(artifact.read(folder), DIGEST)
