"""What `chorus train` can be told: one YAML file and `--set` overrides, validated once, never changed after.

Knows names, types and limits. Does not know the base model or the data: what depends on them (does a target module
exist, is the file readable) is checked where they are read, before the first step.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from chorus.errors import FieldViolation, InvalidArgument

ALL_LINEAR = "all-linear"


def _target_modules(value: object) -> object:
    """Checked by hand: a pydantic union would report one mistake once per member."""
    if isinstance(value, str) and value:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise ValueError(f"must be {ALL_LINEAR!r}, a list of module names, or a regular expression over module paths")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Where the examples are: JSONL files of {"prompt", "completion"} or of {"messages"}, and how they are laid out."""

    train: Path = Field(description="JSONL file to learn from.")
    validation: Path | None = Field(default=None, description="JSONL file to measure on; never learned from.")
    validation_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="In place of `validation`: this share of the distinct prompts is held out.",
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Tokens of prompt, completion and EOS together; the base's context length if unset.",
    )

    chat_template: str | None = Field(
        default=None,
        min_length=1,
        max_length=65536,
        description="Lays messages out: a file's path, or jinja itself; the base's own if unset.",
    )

    packing: bool = Field(
        default=False,
        description="Several examples in one row of up to `max_length` tokens; `batch_size` then counts rows.",
    )

    @model_validator(mode="after")
    def _whole(self) -> "DataConfig":
        if self.packing and self.max_length is None:
            raise ValueError("packing needs max_length: how many tokens a row holds")
        if self.validation is not None and self.validation_fraction is not None:
            raise ValueError("validation and validation_fraction are both set: keep one (null unsets)")
        return self


class LoraSettings(_Section):
    """The low-rank update, as PEFT means these words."""

    rank: int = Field(default=8, ge=1, le=1024, description="Rank of the update.")
    alpha: int = Field(default=16, ge=1, description="The update is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the update's input, while training.")
    target_modules: Annotated[str | tuple[str, ...], BeforeValidator(_target_modules)] = Field(
        default=ALL_LINEAR,
        description="`all-linear`, a list of module names, or a regular expression over module paths.",
    )
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead.")


class LoopConfig(_Section):
    """How long and how fast to learn."""

    steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps; 120 if neither this nor `epochs` is set."
    )
    epochs: int | None = Field(default=None, ge=1, description="In place of `steps`: passes over the training data.")
    batch_size: int = Field(
        default=16, ge=1, description="Examples (with `data.packing` packed rows) that go through the model at once."
    )
    gradient_accumulation: int = Field(
        default=1, ge=1, description="Batches per step; every token of them weighs the same, as in one big batch."
    )
    learning_rate: float = Field(default=5e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(default=10, ge=0, description="Steps over which the rate climbs linearly from 0.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="The rate after warm-up.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are scaled down to this norm.")
    eval_every: int = Field(default=50, ge=1, description="Steps between evaluations on the validation data.")
    best_metric: Literal["loss", "token_accuracy", "exact_match"] = Field(
        default="loss", description="The validation metric whose best adapter is exported."
    )
    patience: int | None = Field(
        default=None, ge=1, description="Evaluations without progress before the run stops; never if unset."
    )
    min_delta: float = Field(
        default=0.0, ge=0, description="Progress is a gain in `best_metric` of more than this; for `patience`."
    )
    checkpoint_every: int = Field(default=100, ge=1, description="Steps between checkpoints, for `--resume`.")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Same seed, data and machine: the same adapter, bit for bit."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type of the frozen base; the adapter learns in float32 either way."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="`auto` takes CUDA where there is one.")

    @model_validator(mode="after")
    def _one_length(self) -> "LoopConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both set: keep one (null unsets)")
        return self


class TaskConfig(_Section):
    """What the adapter is for; recorded in task.json. The template is not applied: data holds whole prompts."""

    name: str = Field(default="generate", min_length=1, max_length=128, description="The task's name.")
    prompt_template: str | None = Field(
        default=None, max_length=65536, description="How callers should lay out a prompt, with {field} names."
    )


class TrainConfig(_Section):
    """One training run."""

    base: str | None = Field(
        default=None, min_length=1, description="Local folder or hub id; the embedded base if unset."
    )
    data: DataConfig
    lora: LoraSettings = LoraSettings()
    train: LoopConfig = LoopConfig()
    task: TaskConfig = TaskConfig()

    @model_validator(mode="after")
    def _patience_has_something_to_watch(self) -> "TrainConfig":
        if self.train.patience is not None and not (self.data.validation or self.data.validation_fraction):
            raise ValueError("train.patience needs validation data: set data.validation or data.validation_fraction")
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file, applies `--set` overrides (`train.steps=10`), resolves relative paths against its folder.

    Raises:
        InvalidArgument: an unreadable file, an unknown key, a value out of range; one line, naming the key.
    """
    values = _read_mapping(path)
    for override in overrides:
        _apply(values, override)
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        raise _one_line(path, error) from None
    return _resolve(config, path.resolve().parent)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InvalidArgument(f"{where}: not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InvalidArgument(f"{path}: must be a mapping with the keys {', '.join(TrainConfig.model_fields)}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InvalidArgument(f"--set {override}: must look like train.steps=10", field=key)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InvalidArgument(f"--set {override}: the value is not valid YAML", field=key) from None
    section: Any = values
    for part in parts[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise InvalidArgument(f"--set {override}: {part} is a value, not a section", field=key)
    section[parts[-1]] = value


def _one_line(path: Path, error: ValidationError) -> InvalidArgument:
    violations = []
    for problem in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in problem["loc"]) or "config"
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            what = f"unknown key; {_known(problem['loc'])}"
        elif problem["type"] == "missing":
            what = "is required"
        elif not isinstance(problem["input"], dict | BaseModel):
            what = f"{what} (got {problem['input']!r})"
        violations.append(FieldViolation(key, what))
    text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
    return InvalidArgument(f"{path}: {text}", reason="BAD_CONFIG", violations=violations)


def _known(path: tuple[int | str, ...]) -> str:
    """What was probably meant by an unknown key, and the keys that its section has."""
    *sections, last = map(str, path)
    sought: type[BaseModel] = TrainConfig
    for section in sections:
        sought = cast(type[BaseModel], sought.model_fields[section].annotation)
    keys = list(sought.model_fields)
    elsewhere = {
        name: f"{section}.{name}"
        for section, field in TrainConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for name in field.annotation.model_fields
    }
    close = get_close_matches(last, keys, n=1) or [elsewhere[name] for name in get_close_matches(last, elsewhere, n=1)]
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}{'.'.join(sections) or 'the file'} has the keys {', '.join(keys)}"


def _resolve(config: TrainConfig, folder: Path) -> TrainConfig:
    data = config.data.model_copy(
        update={
            "train": folder / config.data.train.expanduser(),
            "validation": config.data.validation and folder / config.data.validation.expanduser(),
            "chat_template": _template(config.data.chat_template, folder),
        }
    )
    base = config.base
    if base is not None and (folder / Path(base).expanduser()).is_dir():
        base = str(folder / Path(base).expanduser())
    return config.model_copy(update={"data": data, "base": base})


def _template(text: str | None, folder: Path) -> str | None:
    """Jinja as it is, or what the file of that name holds: a path has no `{{` or `{%`."""
    if text is None or "{{" in text or "{%" in text:
        return text
    path = folder / Path(text).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        why = error.strerror or str(error)
    except ValueError:
        why = "not UTF-8 text"
    raise InvalidArgument(f"data.chat_template: {path}: {why}", reason="BAD_CONFIG", field="data.chat_template")
