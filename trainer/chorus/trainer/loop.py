"""Training: `train` is set-up, fit, export, in that order.

Knows the run. Does not know file formats (`data`, `export`), where LoRA goes (`lora`) or what a step is (`fit`).
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from peft import PeftModelForCausalLM

from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.trainer.base import Base, load_base
from chorus.trainer.batches import steps_per_epoch
from chorus.trainer.checkpoint import Checkpoints, checkpoint_path, identity
from chorus.trainer.config import LoopConfig, TrainConfig
from chorus.trainer.data import DataReport, Dataset, Tokens, load_dataset
from chorus.trainer.export import staged, task_card, write_adapter
from chorus.trainer.fit import Fitted, fit
from chorus.trainer.interrupts import Interrupted, Stop
from chorus.trainer.lora import attach_lora
from chorus.trainer.model_card import FILE_NAME as CARD_NAME
from chorus.trainer.model_card import model_card
from chorus.trainer.packing import check_honoured
from chorus.trainer.records import LOG_NAME, OnProgress, Record, TrainLog
from chorus.trainer.snapshot import Snapshot

DEFAULT_STEPS: Final = 120


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run gave. Validation's values are None without validation data; `best_step` is the exported adapter's.

    Losses are means per target token. `steps` counts those taken, fewer than asked for if `stopped_early`. `tokens`
    counts prompts and completions that were trained on, `seconds` this process's whole run with its set-up.
    """

    output: Path
    steps: int
    best_step: int
    stopped_early: bool
    train_loss: float
    validation_loss_before: float | None
    validation_loss: float | None
    validation_token_accuracy_before: float | None
    validation_token_accuracy: float | None
    validation_exact_match_before: float | None
    validation_exact_match: float | None
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


def train(
    config: TrainConfig,
    output: Path,
    on_progress: OnProgress | None = None,
    *,
    resume: bool = False,
    stop: Stop | None = None,
) -> TrainResult:
    """Trains one adapter and publishes it at `output`, which appears complete or not at all.

    Checkpoints lie beside it, see `checkpoint`, until the run is complete. With `resume` the run goes on from there,
    and ends with the bytes of a run that was never stopped. `stop` is heeded between steps.

    Raises:
        InvalidArgument: bad data, a target that is not there, an `output` that is not empty; a checkpoint that is not
            there, or is there without `resume`.
        NotFound, FailedPrecondition: the base, see `load_base`; a device that is not there; a loss that is not finite;
            another run's checkpoint.
        Interrupted: `stop` was wished for; the checkpoint is written.
    """
    started = time.monotonic()
    device = pick_device(config.train.device)
    path = checkpoint_path(output)
    _check_checkpoint(path, wanted=resume)
    with staged(output) as folder, seeded(config.train.seed, device):
        run = set_up(config, device)
        checkpoints = Checkpoints(path, identity(config, run.base, run.data, device), resume)
        fitted = _fit(run, config.train, folder / LOG_NAME, checkpoints, on_progress, stop or Stop())
        card = task_card(run.base, config.task, run.data, fitted.metrics)
        write_adapter(folder, run.model, run.base.name, card)
        (folder / CARD_NAME).write_text(model_card(run.base, config, card, run.data.report), encoding="utf-8")
    path.unlink(missing_ok=True)
    return _result(output, run, fitted, time.monotonic() - started)


def _fit(
    run: Setup,
    config: LoopConfig,
    log_path: Path,
    checkpoints: Checkpoints,
    on_progress: OnProgress | None,
    stop: Stop,
) -> Fitted:
    resumed = checkpoints.resumed()
    with TrainLog(log_path, resumed.log if resumed else b"") as log, stop.stepping():
        if resumed is None:
            log.write(run.data.report)

        def record(item: Record) -> None:
            log.write(item)
            if on_progress is not None:
                on_progress(item)

        def after_step(step: int, take: Callable[[], Snapshot]) -> None:
            if stop.signum is not None or step % config.checkpoint_every == 0:
                checkpoints.write(take(), log.content())
            if stop.signum is not None:
                raise Interrupted(stop.signum, step, run.steps, checkpoints.path)

        try:
            return fit(
                run.model,
                run.data,
                config,
                steps=run.steps,
                pad=run.base.pad,
                record=record,
                resume=resumed and resumed.snapshot,
                after_step=after_step,
            )
        except FailedPrecondition:
            # Diverged: to go on from just before would diverge again.
            checkpoints.path.unlink(missing_ok=True)
            raise


def _result(output: Path, run: Setup, fitted: Fitted, seconds: float) -> TrainResult:
    before, best = fitted.metrics.before, fitted.metrics.best
    return TrainResult(
        output=output,
        steps=fitted.steps,
        best_step=fitted.best_step,
        stopped_early=fitted.stopped_early,
        train_loss=fitted.metrics.train_loss,
        validation_loss_before=before.loss if before else None,
        validation_loss=best.loss if best else None,
        validation_token_accuracy_before=before.token_accuracy if before else None,
        validation_token_accuracy=best.token_accuracy if best else None,
        validation_exact_match_before=before.exact_match if before else None,
        validation_exact_match=best.exact_match if best else None,
        trainable_parameters=sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        base_parameters=run.base_parameters,
        tokens=fitted.tokens,
        seconds=seconds,
        data=run.data.report,
    )


def _check_checkpoint(path: Path, *, wanted: bool) -> None:
    """Known before any work: nobody's steps are thrown away, and none are waited for that are not there."""
    if wanted and not path.exists():
        raise InvalidArgument(
            f"resume: no checkpoint at {path}; leave --resume out to begin anew", reason="NO_CHECKPOINT", field="resume"
        )
    if path.exists() and not wanted:
        raise InvalidArgument(
            f"output: {path} is of a run that was interrupted; go on with --resume, or remove it to begin anew",
            reason="CHECKPOINT_LEFT",
            field="output",
        )


def set_up(config: TrainConfig, device: torch.device) -> Setup:
    """Loads the base, reads the data, attaches the adapter; to be called under `seeded`. Raises as `train` does."""
    base = load_base(config.base, device, getattr(torch, config.train.dtype))
    tokens = Tokens(base.tokenizer, base.eos, _max_length(config, base), base.stops)
    data = load_dataset(config.data, tokens, config.train.seed)
    if config.data.packing:
        check_honoured(base.module, data.report.max_length)
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


def _steps(config: LoopConfig, rows: int) -> int:
    if config.epochs is not None:
        return -(-config.epochs * steps_per_epoch(rows, config.batch_size) // config.gradient_accumulation)
    return config.steps or DEFAULT_STEPS
