"""An adapter as it lies on disk: `adapter_config.json`, `adapter_model.safetensors`, optionally `task.json`.

`read` answers one question: is this a sound file of a kind that we know? Whether it fits a base is `Lowering.fit`'s
matter. Nothing here imports, unpickles, downloads or follows a link.
"""

import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Annotated

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from chorus.adapters import chat_template as templates
from chorus.adapters import safetensors_file
from chorus.adapters.lora_config import CONFIG_FILE, LoraConfig, parse_config
from chorus.adapters.safetensors_file import open_regular, refuse_pickle
from chorus.adapters.strict_json import parse_object, quote, validate
from chorus.errors import FailedPrecondition, InvalidArgument

TENSORS_FILE = "adapter_model.safetensors"
TASK_FILE = "task.json"
FILE_NAMES = (CONFIG_FILE, TENSORS_FILE, TASK_FILE)

JSON_LIMIT = 4 << 20
"""Bytes of either JSON file."""

KEY_PREFIX = "base_model.model."
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})

Text = Annotated[str, Field(max_length=65536)]
Digest = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]


class TaskCard(BaseModel):
    """The sidecar `task.json`: what serving needs and PEFT's config does not say.

    Known fields are checked strictly. Unknown ones are ignored, so that newer trainers may add notes; a field that
    changes what an existing one means has to raise `format_version`, and what is newer than 1 is refused.
    `base_digest` and `tokenizer_digest` are SHA-256, hex; `max_length` counts tokens. `chat_template` is jinja, and
    lays out dialogues in place of the tokenizer's.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    format_version: Annotated[int, Field(ge=1)] = 1
    task: Annotated[str, Field(max_length=128)] = ""
    labels: Annotated[
        tuple[Annotated[str, Field(max_length=512)], ...],
        Field(max_length=10_000),
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    ] = ()
    prompt_template: Text | None = None
    chat_template: Annotated[str, Field(min_length=1, max_length=templates.MAX_CHARS)] | None = None
    base_digest: Digest | None = None
    tokenizer_digest: Digest | None = None
    max_length: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    metrics: Annotated[dict[Annotated[str, Field(max_length=128)], FiniteFloat], Field(max_length=256)] = {}
    trainer_version: Annotated[str, Field(max_length=128)] | None = None
    data_digest: Annotated[str, Field(max_length=128)] | None = None


@dataclass(frozen=True, slots=True)
class Artifact:
    """A sound adapter. `tensors` are named without PEFT's prefix (`model.layers.0...lora_A.weight`) and all finite;
    `size_bytes` counts their bytes as stored.
    """

    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    task: TaskCard | None
    size_bytes: int


def check_file_name(name: str, field: str = "files.name") -> str:
    """Gives back the name of a file that an adapter may have.

    Raises:
        InvalidArgument: any other name; PICKLE_REFUSED for those that pickles carry.
    """
    if name in FILE_NAMES:
        return name
    if PurePath(name[-255:]).suffix.lower() in _PICKLE_SUFFIXES:
        refuse_pickle(quote(name))
    raise InvalidArgument(
        f"{field}: {quote(name)} is not a file of an adapter; those are {', '.join(FILE_NAMES)}",
        reason="UNKNOWN_FILE",
        field=field,
    )


def read(folder: Path) -> Artifact:
    """Reads and checks an adapter. Other regular files in the folder (README.md) are left unopened.

    Raises:
        InvalidArgument: a missing, corrupt or malformed file; a symlink in the folder; weights as a pickle; a tensor
            that is not finite.
        FailedPrecondition: well formed, but a kind, config field, dtype or format that is not served.
    """
    _check_folder(folder)
    config = _read_config(folder)
    task = read_task(folder)
    stored = safetensors_file.read(folder / TENSORS_FILE)
    for entry in stored.entries:
        if not entry.name.startswith(KEY_PREFIX):
            raise InvalidArgument(
                f"tensor {quote(entry.name, 200)} does not start with {KEY_PREFIX}, as PEFT writes it",
                reason="UNKNOWN_TENSOR",
                field=TENSORS_FILE,
            )
    if name := stored.not_finite():
        raise InvalidArgument(
            f"tensor {quote(name, 200)} holds NaN or infinity", reason="NOT_FINITE", field=TENSORS_FILE
        )
    tensors = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in stored.tensors().items()}
    return Artifact(config, tensors, task, sum(tensor.nbytes for tensor in tensors.values()))


def check_base(artifact: Artifact, base_digest: str) -> None:
    """Refuses an adapter whose task card names another base.

    Raises:
        FailedPrecondition: BASE_MISMATCH.
    """
    wanted = artifact.task.base_digest if artifact.task else None
    if wanted and wanted != base_digest:
        raise FailedPrecondition(
            f"{TASK_FILE}: the adapter was made for the base {wanted}, this server runs {base_digest}",
            reason="BASE_MISMATCH",
            field="base_digest",
        )


def _check_folder(folder: Path) -> None:
    """No links or devices, and no weights in a form that a loader might unpickle."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidArgument("there is no such adapter folder", reason="MISSING_FILE") from None
    for entry in entries:
        mode = entry.stat(follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InvalidArgument(
                f"{quote(entry.name)} is not a regular file", reason="NOT_A_REGULAR_FILE", field=quote(entry.name)
            )
        path = PurePath(entry.name)
        if path.stem == PurePath(TENSORS_FILE).stem and path.suffix.lower() in _PICKLE_SUFFIXES:
            refuse_pickle(entry.name)


def _read_config(folder: Path) -> LoraConfig:
    data = _read_small(folder / CONFIG_FILE)
    return (_config_kept if len(data) <= _KEPT_BYTES else _config)(data)


def _config(data: bytes) -> LoraConfig:
    return parse_config(parse_object(data, CONFIG_FILE))


# What one recipe trains has one config, to the byte.
_config_kept = lru_cache(maxsize=64)(_config)
_KEPT_BYTES = 1 << 14


def _read_small(path: Path) -> bytes:
    with open_regular(path) as file:
        data = file.read(JSON_LIMIT + 1)
    if len(data) > JSON_LIMIT:
        raise InvalidArgument(f"{path.name} is over {JSON_LIMIT} bytes", reason="FILE_TOO_LARGE", field=path.name)
    return data


def read_task(folder: Path) -> TaskCard | None:
    """Reads and checks the task card alone; None where the adapter has none. Raises as `read` does."""
    path = folder / TASK_FILE
    if not os.path.lexists(path):
        return None
    card = validate(TaskCard, parse_object(_read_small(path), TASK_FILE), TASK_FILE)
    if card.format_version > 1:
        raise FailedPrecondition(
            f"{TASK_FILE}: format_version {card.format_version} is newer than this server's 1",
            reason="UNSUPPORTED_FIELD",
            field="format_version",
        )
    if card.chat_template is not None:
        templates.check(card.chat_template, f"{TASK_FILE}: chat_template")
    return card
