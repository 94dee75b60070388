"""The whole run: what it leaves on disk, what repeats, what it refuses, and that it is all or nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from chorus.adapters import artifact
from chorus.errors import ChorusError, FailedPrecondition, InvalidArgument, NotFound
from chorus.models.digest import base_digest, tokenizer_digest
from chorus.trainer.config import TrainConfig
from chorus.trainer.export import task_card, write_adapter
from chorus.trainer.fit import fit
from chorus.trainer.loop import seeded, set_up, train
from chorus.trainer.records import Record, StepRecord

Change = Callable[..., TrainConfig]
Spoil = Callable[[Path], object]

CPU = torch.device("cpu")
IDS = torch.arange(2, 42).reshape(2, 20)
REPEATED = ("adapter_config.json", "adapter_model.safetensors", "task.json", "README.md")


def bytes_of(output: Path) -> dict[str, bytes]:
    return {name: (output / name).read_bytes() for name in REPEATED}


def folders_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


@pytest.mark.parametrize("lora", [{}, {"rslora": True, "target_modules": ["q_proj", "v_proj"]}])
def test_the_export_loads_in_peft_and_gives_the_trained_models_logits(
    changed: Change, base_folder: Path, tmp_path: Path, lora: dict[str, object]
) -> None:
    config = changed(lora=lora)
    with seeded(0, CPU):
        run = set_up(config, CPU)
        fitted = fit(run.model, run.data, config.train, steps=run.steps, pad=run.base.pad, record=lambda _: None)
    write_adapter(tmp_path, run.model, run.base.name, task_card(run.base, config.task, run.data, fitted.metrics))
    fresh = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with torch.no_grad():
        base_logits = fresh(input_ids=IDS).logits
        want = run.model(input_ids=IDS).logits
        got = PeftModel.from_pretrained(fresh, tmp_path)(input_ids=IDS).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert (want - base_logits).abs().max() > 0.1


def test_the_server_reads_the_export(changed: Change, base_folder: Path, tmp_path: Path) -> None:
    config = changed(task={"name": "colours", "prompt_template": "Message: {text}\nReply:"}, data={"max_length": 60})
    result = train(config, tmp_path / "out")
    found = artifact.read(tmp_path / "out")
    artifact.check_base(found, base_digest(base_folder))
    card = found.task
    assert card is not None
    assert (card.task, card.prompt_template, card.max_length) == ("colours", "Message: {text}\nReply:", 60)
    assert card.tokenizer_digest == tokenizer_digest(base_folder)
    assert card.metrics == {
        "train_loss": result.train_loss,
        "validation_loss_before": result.validation_loss_before,
        "validation_loss": result.validation_loss,
        "validation_token_accuracy_before": result.validation_token_accuracy_before,
        "validation_token_accuracy": result.validation_token_accuracy,
        "validation_exact_match_before": result.validation_exact_match_before,
        "validation_exact_match": result.validation_exact_match,
    }
    assert sum(tensor.numel() for tensor in found.tensors.values()) == result.trainable_parameters
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}


def test_the_export_is_five_files_and_tells_no_path(config: TrainConfig, base_folder: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*REPEATED, "train_log.jsonl"])
    assert not any(str(base_folder.parent).encode() in content for content in bytes_of(tmp_path / "out").values())
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == base_folder.name
    assert adapter["target_modules"] == sorted(adapter["target_modules"])


def test_the_settings_of_lora_reach_the_adapter(changed: Change, tmp_path: Path) -> None:
    lora = {"rank": 3, "alpha": 7, "dropout": 0.25, "rslora": True, "target_modules": r".*\.1\..*\.q_proj"}
    train(changed(lora=lora, train={"steps": 1}), tmp_path / "out")
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"], adapter["use_rslora"]) == (3, 7, 0.25, True)
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {name.split("layers.")[1]: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "1.self_attn.q_proj.lora_A.weight": (3, 32),
        "1.self_attn.q_proj.lora_B.weight": (32, 3),
    }


def test_same_seed_same_bytes(changed: Change, tmp_path: Path) -> None:
    changes = {"lora": {"dropout": 0.2}, "data": {"validation": None, "validation_fraction": 0.2}}
    train(changed(**changes), tmp_path / "a")
    torch.rand(3)
    train(changed(**changes), tmp_path / "b")
    train(changed(**changes, train={"seed": 1}), tmp_path / "c")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert bytes_of(tmp_path / "a") != bytes_of(tmp_path / "c")


def test_dropout_changes_what_is_learned(changed: Change, tmp_path: Path) -> None:
    train(changed(), tmp_path / "a")
    train(changed(lora={"dropout": 0.3}), tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()


def test_the_callers_random_numbers_are_left_alone(config: TrainConfig, tmp_path: Path) -> None:
    torch.manual_seed(7)
    want = torch.rand(4)
    torch.manual_seed(7)
    train(config, tmp_path / "out")
    assert torch.equal(torch.rand(4), want)


def test_a_bfloat16_base_trains_a_float32_adapter(changed: Change, tmp_path: Path) -> None:
    result = train(changed(train={"dtype": "bfloat16", "steps": 30}), tmp_path / "out")
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert result.validation_loss_before is not None
    assert result.train_loss < result.validation_loss_before


def test_gpt2_with_its_transposed_linears_trains(changed: Change, base_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(base_folder, folder)
    gpt2 = GPT2Config(vocab_size=320, n_positions=128, n_embd=32, n_layer=1, n_head=2, eos_token_id=0, bos_token_id=1)
    GPT2LMHeadModel(gpt2).save_pretrained(folder)
    train(changed(train={"steps": 2}).model_copy(update={"base": str(folder)}), tmp_path / "out")
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert adapter["fan_in_fan_out"] is True
    assert {name.rsplit(".", 1)[-1] for name in adapter["target_modules"]} == {"c_attn", "c_fc", "c_proj"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_cut_short_leaves_nothing(
    config: TrainConfig, tmp_path: Path, error: type[BaseException]
) -> None:
    def stop(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == 3:
            assert len(folders_in(tmp_path)) == 1  # under way, beside its future place
            raise error

    with pytest.raises(error):
        train(config, tmp_path / "out", stop)
    assert folders_in(tmp_path) == []


def test_an_output_that_holds_something_is_left_alone(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    with pytest.raises(InvalidArgument, match="is there already"):
        train(config, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_an_empty_output_folder_is_used(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    train(config, tmp_path / "out")
    assert folders_in(tmp_path) == ["out"]
    assert (tmp_path / "out/task.json").is_file()


@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (["q_proj", "w_proj"], "'w_proj' matches no module"),
        (r".*\.nowhere", "matches no module"),
        (["embed_tokens"], "no linear layer"),
        (["self_attn"], "no linear layer"),
    ],
)
def test_targets_that_are_not_there_are_refused(changed: Change, tmp_path: Path, targets: object, what: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"lora\.target_modules: .*{what}"):
        train(changed(lora={"target_modules": targets}), tmp_path / "out")
    assert folders_in(tmp_path) == []


def test_a_length_beyond_the_context_is_refused(changed: Change, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"data\.max_length: 129 exceeds .* 128"):
        train(changed(data={"max_length": 129}), tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "error", "what"),
    [
        (shutil.rmtree, NotFound, "no folder"),
        (lambda folder: (folder / "config.json").unlink(), InvalidArgument, "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), InvalidArgument, "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), InvalidArgument, "safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), FailedPrecondition, "tokenizer"),
        (lambda folder: edit(folder, architectures=["LlamaModel"]), FailedPrecondition, "causal decoders"),
        (lambda folder: edit(folder, num_hidden_layers=3), InvalidArgument, "the first is model.layers.2"),
    ],
)
def test_a_bad_base_is_refused_in_one_line(
    changed: Change, base_folder: Path, tmp_path: Path, *, spoil: Spoil, error: type[ChorusError], what: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    spoil(folder)
    with pytest.raises(error, match=what) as caught:
        train(changed().model_copy(update={"base": str(folder)}), tmp_path / "out")
    assert "\n" not in caught.value.message
    assert not (tmp_path / "out").exists()


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_cuda_is_refused_where_there_is_none(changed: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FailedPrecondition, match=r"train\.device"):
        train(changed(train={"device": "cuda"}), tmp_path / "out")


@pytest.mark.gpu
def test_same_seed_same_bytes_on_cuda(changed: Change, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(changed(train={"device": "cuda"}, lora={"dropout": 0.2}), tmp_path / name)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
