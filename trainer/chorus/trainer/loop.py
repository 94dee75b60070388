"""Training: `train` is set-up, fit, export, in that order.

Knows the run. Does not know file formats (`data`, `export`), where LoRA goes (`lora`) or what a step is (`fit`).
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from peft import PeftModelForCausalLM

from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.trainer.base import Base, load_base
from chorus.trainer.batches import steps_per_epoch
from chorus.trainer.config import LoopConfig, TrainConfig
from chorus.trainer.data import DataReport, Dataset, load_dataset
from chorus.trainer.export import staged, task_card, write_adapter
from chorus.trainer.fit import fit
from chorus.trainer.lora import attach_lora
from chorus.trainer.records import LOG_NAME, OnProgress, Record, TrainLog

DEFAULT_STEPS: Final = 120


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run gave. Losses are means per target token; validation losses are None without validation data.

    `tokens` counts prompts and completions that were trained on, `seconds` the whole run with its set-up.
    """

    output: Path
    steps: int
    train_loss: float
    validation_loss_before: float | None
    validation_loss: float | None
    trainable_parameters: int
    base_parameters: int
    tokens: int
    seconds: float
    data: DataReport


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that a run needs, ready for the first step."""

    base: Base
    base_parameters: int
    model: PeftModelForCausalLM
    data: Dataset
    steps: int


def train(config: TrainConfig, output: Path, on_progress: OnProgress | None = None) -> TrainResult:
    """Trains one adapter and publishes it at `output`, which appears complete or not at all.

    Raises:
        InvalidArgument: bad data, a target that is not there, an `output` that is not empty.
        NotFound, FailedPrecondition: the base, see `load_base`; a device that is not there; a loss that is not finite.
    """
    started = time.monotonic()
    device = pick_device(config.train.device)
    with staged(output) as folder, seeded(config.train.seed, device):
        run = set_up(config, device)
        with TrainLog(folder / LOG_NAME) as log:
            log.write(run.data.report)

            def record(item: Record) -> None:
                log.write(item)
                if on_progress is not None:
                    on_progress(item)

            fitted = fit(run.model, run.data, config.train, steps=run.steps, pad=run.base.pad, record=record)
        card = task_card(run.base, config.task, run.data, fitted.metrics)
        write_adapter(folder, run.model, run.base.name, card)
    return TrainResult(
        output=output,
        steps=run.steps,
        train_loss=fitted.metrics.train_loss,
        validation_loss_before=fitted.metrics.validation_loss_before,
        validation_loss=fitted.metrics.validation_loss,
        trainable_parameters=sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        base_parameters=run.base_parameters,
        tokens=fitted.tokens,
        seconds=time.monotonic() - started,
        data=run.data.report,
    )


def set_up(config: TrainConfig, device: torch.device) -> Setup:
    """Loads the base, reads the data, attaches the adapter; to be called under `seeded`. Raises as `train` does."""
    base = load_base(config.base, device, getattr(torch, config.train.dtype))
    data = load_dataset(config.data, base.tokenizer, base.eos, _max_length(config, base), config.train.seed)
    base_parameters = base.module.num_parameters()
    model = attach_lora(base.module, config.lora)
    return Setup(base, base_parameters, model, data, _steps(config.train, len(data.train)))


def pick_device(wanted: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means here.

    Raises:
        FailedPrecondition: "cuda" where there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise FailedPrecondition("train.device: cuda was asked for, torch sees none", reason="NO_DEVICE")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch for the adapter's first weights and dropout; puts the caller's generators back afterwards.

    On CUDA, kernels whose order of summation varies are left out too, where torch has another.
    """
    on_cuda = device.type == "cuda"
    if on_cuda:  # read when cuBLAS starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was_strict = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_cuda else []):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(was_strict or on_cuda, warn_only=was_warning or not was_strict)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_strict, warn_only=was_warning)


def _max_length(config: TrainConfig, base: Base) -> int:
    wanted, context = config.data.max_length, base.context
    if wanted is None and context is None:
        raise InvalidArgument("data.max_length: must be set, the base names no context length", field="data.max_length")
    if wanted is not None and context is not None and wanted > context:
        raise InvalidArgument(
            f"data.max_length: {wanted} exceeds the base's context length, {context}", field="data.max_length"
        )
    return wanted or context or 0


def _steps(config: LoopConfig, examples: int) -> int:
    if config.epochs is not None:
        return config.epochs * steps_per_epoch(examples, config.batch_size)
    return config.steps or DEFAULT_STEPS
