"""The config file: defaults, overrides, and one line for whatever is wrong."""

from pathlib import Path

import pytest

from chorus.errors import InvalidArgument
from chorus.trainer.config import TrainConfig, load_config

MINIMAL = "data: {train: train.jsonl}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def test_only_training_data_is_required(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert config.base is None
    assert config.lora.target_modules == "all-linear"


def test_relative_paths_start_at_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "my-base").mkdir()
    config = load(tmp_path, "base: my-base\ndata: {train: a/t.jsonl, validation: /v.jsonl}\n")
    assert config.data.train == tmp_path / "a/t.jsonl"
    assert config.data.validation == Path("/v.jsonl")
    assert config.base == str(tmp_path / "my-base")


def test_a_base_that_is_no_folder_stays_a_hub_id(tmp_path: Path) -> None:
    assert load(tmp_path, "base: org/name\n" + MINIMAL).base == "org/name"


def test_set_overrides_with_yaml_values(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL + "train: {steps: 50, learning_rate: 0.1}\n",
        "train.steps=null",
        "train.epochs=2",
        "train.learning_rate=5e-4",
        "lora.target_modules=[q_proj, v_proj]",
        "lora.rslora=true",
        "train.epochs=3",
    )
    assert (config.train.steps, config.train.epochs, config.train.learning_rate) == (None, 3, 5e-4)
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.lora.rslora


@pytest.mark.parametrize(
    ("text", "key", "what"),
    [
        ("", "data", "required"),
        ("data: {}", "data.train", "required"),
        ("- a\n- b", "config.yaml", "mapping"),
        ("data: [", "config.yaml:1", "not valid YAML"),
        (MINIMAL + "trian: {steps: 3}", "trian", "unknown key"),
        (MINIMAL + "train: {step: 3}", "train.step", "unknown key"),
        (MINIMAL + "train: {steps: 0}", "train.steps", "greater than or equal to 1 (got 0)"),
        (MINIMAL + "train: {steps: 3, epochs: 1}", "train", "both set"),
        (MINIMAL + "train: {learning_rate: .nan}", "train.learning_rate", "finite"),
        (MINIMAL + "train: {learning_rate: fast}", "train.learning_rate", "'fast'"),
        (MINIMAL + "train: {schedule: step}", "train.schedule", "'cosine', 'linear' or 'constant'"),
        (MINIMAL + "train: {dtype: float16}", "train.dtype", "float16"),
        (MINIMAL + "train: 3", "train", "dictionary"),
        (MINIMAL + "lora: {dropout: 1.0}", "lora.dropout", "less than 1"),
        (MINIMAL + "lora: {target_modules: 3}", "lora.target_modules", "all-linear"),
        (MINIMAL + "lora: {target_modules: []}", "lora.target_modules", "all-linear"),
        (MINIMAL + "lora: {target_modules: '*q'}", "lora.target_modules", "regular expression"),
        ("data: {train: a, validation: b, validation_fraction: 0.1}", "data", "both set"),
        ("data: {train: a, packing: true}", "data", "packing needs max_length"),
        ("data: {train: a, validation_fraction: 1.5}", "data.validation_fraction", "less than 1"),
    ],
)
def test_a_bad_file_gives_one_line_naming_the_key(tmp_path: Path, text: str, key: str, what: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(tmp_path, text)
    message = caught.value.message
    assert "\n" not in message
    assert f"{key}: " in message
    assert what in message
    assert message.count(key) == 1


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("train.lerning_rate", "did you mean learning_rate? train has the keys steps, epochs, batch_size, "),
        ("trian.steps", "did you mean train? the file has the keys base, data, lora, train, task"),
        ("learning_rate", "did you mean train.learning_rate? the file has the keys base, "),
        ("lora.xyzzy", "unknown key; lora has the keys rank, alpha, dropout, target_modules, rslora"),
        ("data.max_lenght", "did you mean max_length? data has the keys train, "),
    ],
)
def test_an_unknown_key_names_the_nearest_and_the_sections(tmp_path: Path, key: str, what: str) -> None:
    """In the file and on the command line alike, in one line."""
    section, _, name = key.rpartition(".")
    text = {"data": f"data: {{train: train.jsonl, {name}: 1}}\n"}.get(
        section, MINIMAL + (f"{section}: {{{name}: 1}}\n" if section else f"{name}: 1\n")
    )
    for arguments in ((text,), (MINIMAL, f"{key}=1")):
        with pytest.raises(InvalidArgument) as caught:
            load(tmp_path, *arguments)
        assert what in caught.value.message
        assert "\n" not in caught.value.message


@pytest.mark.parametrize("where", ["chat.jinja", "{{ messages }}"])
def test_a_chat_template_is_a_files_or_itself(tmp_path: Path, where: str) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    config = load(tmp_path, f"data: {{train: t.jsonl, chat_template: '{where}'}}\n")
    assert config.data.chat_template == "{{ messages }}"


def test_a_chat_template_that_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^data\.chat_template: .*gone\.jinja: No such file"):
        load(tmp_path, "data: {train: t.jsonl, chat_template: gone.jinja}\n")


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.steps", "train.steps=10"),
        ("=3", "train.steps=10"),
        ("train..steps=3", "train.steps=10"),
        ("train.steps=[", "not valid YAML"),
        ("train.steps.now=3", "steps is a value"),
        ("train.stepz=3", "train.stepz: unknown key"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, what: str) -> None:
    with pytest.raises(InvalidArgument, match=what.replace("(", r"\(")) as caught:
        load(tmp_path, MINIMAL + "train: {steps: 5}", override)
    assert "\n" not in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
