"""What a run says while it runs, and the JSONL file that keeps it."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from chorus.trainer.data import DataReport
from chorus.trainer.metrics import Validation

LOG_NAME = "train_log.jsonl"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimiser step. `loss`: mean over the batch's target tokens, before the update; `lr`: the rate it used;
    `grad_norm`: before clipping; `tokens` (prompts included) and `seconds`: since training began."""

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """The whole validation set after `step` steps; see `metrics.Validation`."""

    step: int
    steps: int
    validation_loss: float
    validation_token_accuracy: float
    validation_exact_match: float
    tokens: int
    seconds: float

    @classmethod
    def of(cls, validation: Validation, step: int, steps: int, tokens: int, seconds: float) -> "EvalRecord":
        """The record of one evaluation."""
        measured = (validation.loss, validation.token_accuracy, validation.exact_match)
        return cls(step, steps, *measured, tokens, seconds)


Record = StepRecord | EvalRecord
OnProgress = Callable[[Record], None]

_KINDS = {StepRecord: "step", EvalRecord: "eval", DataReport: "data"}


class TrainLog:
    """A JSONL file, one object per record, each told apart by "kind": data, step or eval.

    `before` is what an interrupted run had written.
    """

    def __init__(self, path: Path, before: bytes = b"") -> None:
        path.write_bytes(before)
        self._path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def content(self) -> bytes:
        """All that was written so far."""
        self._file.flush()
        return self._path.read_bytes()

    def write(self, record: Record | DataReport) -> None:
        fields: dict[str, Any] = {"kind": _KINDS[type(record)]} | asdict(record)
        self._file.write(json.dumps(fields, allow_nan=False) + "\n")

    def __enter__(self) -> "TrainLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
