"""The trained adapter on disk: PEFT's two files, our task.json and a model card, all or nothing.

DIR/adapter_config.json  adapter_model.safetensors  task.json  README.md  train_log.jsonl
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from peft import LoraConfig, PeftModelForCausalLM, get_peft_model_state_dict
from safetensors.torch import save

from chorus.adapters import chat_template
from chorus.adapters.artifact import TASK_FILE, TENSORS_FILE, TaskCard
from chorus.errors import InvalidArgument
from chorus.trainer.base import Base
from chorus.trainer.config import TaskConfig
from chorus.trainer.data import Dataset
from chorus.trainer.fit import Metrics


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into; it takes `output`'s place on a clean end and vanishes on any other.

    Raises:
        InvalidArgument: `output` is there and not empty, or its place can not be written to. Known before any work.
    """
    staging = output.parent / f".{output.name}.partial-{secrets.token_hex(4)}"
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise InvalidArgument(f"output: {output} is there already; remove it or choose another", field="output")
        staging.mkdir(parents=True)
    except OSError as error:
        raise InvalidArgument(f"output: {output}: {error.strerror or error}", field="output") from None
    try:
        yield staging
        _flush(staging)
        os.rename(staging, output)
        _sync(output.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_adapter(folder: Path, model: PeftModelForCausalLM, base_name: str, card: TaskCard) -> None:
    """Writes the adapter and its card into `folder`; the bytes depend on seed, data and machine alone.

    peft's own `save_pretrained` would add a README of placeholders, ask the hub whether the vocabulary grew, write the
    base's full path, and list the targets in an order that changes from process to process.
    """
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    # Not `save_file`: it makes a file that nobody else may read.
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    (folder / TENSORS_FILE).write_bytes(content)
    (folder / TASK_FILE).write_text(card.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")


def task_card(base: Base, task: TaskConfig, data: Dataset, metrics: Metrics) -> TaskCard:
    """What PEFT's config does not say and serving needs."""
    return TaskCard(
        task=task.name,
        prompt_template=task.prompt_template,
        chat_template=_servable(data.chat_template),
        max_length=data.report.max_length,
        base_digest=base.digest,
        tokenizer_digest=base.tokenizer_digest,
        metrics=flat_metrics(metrics),
        trainer_version=version("chorus-serve"),
        data_digest=data.digest,
    )


def _servable(template: str | None) -> str | None:
    """The template that the data was laid out by. A base's own that is not for uploads is left out: the server, which
    refuses the adapter on another base, takes it from the base."""
    try:
        if template is not None:
            chat_template.check(template, "chat_template")
    except InvalidArgument:
        return None
    return template if template is None or 0 < len(template) <= chat_template.MAX_CHARS else None


def flat_metrics(metrics: Metrics) -> dict[str, float]:
    """By name: `train_loss`; with validation data `validation_X` of the adapter, `validation_X_before` of the base."""
    flat = {"train_loss": metrics.train_loss}
    for measured, suffix in ((metrics.before, "_before"), (metrics.best, "")):
        if measured is not None:
            flat |= {f"validation_{name}{suffix}": value for name, value in asdict(measured).items()}
    return flat


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
