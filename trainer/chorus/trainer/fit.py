"""The steps: AdamW, schedule, accumulation, validation, and the end, early or not.

Knows batches and a model. Does not know where either came from, where the result goes, or checkpoints' files.

Plain torch, no accelerate. Speed did not decide: its steps took 5 % and 14 % longer in two rounds on a busy machine,
and it adds nothing to start-up (peft imports it anyway). But what would be used of it is `.to`, `backward` and
`clip_grad_norm_`, while its device and precision are one choice per process: a bfloat16 run after a float32 one raises,
and the demo trains three tenants in one process. It comes in with the first run on more than one device.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Final

import torch
from torch import nn
from transformers import get_scheduler

from chorus.errors import FailedPrecondition
from chorus.trainer import snapshot as parts
from chorus.trainer.batches import Batch, training_batches
from chorus.trainer.config import LoopConfig
from chorus.trainer.data import Dataset
from chorus.trainer.metrics import Validation, completion_loss, validate
from chorus.trainer.records import EvalRecord, Record, StepRecord
from chorus.trainer.selection import Selection
from chorus.trainer.snapshot import Snapshot

#: `Metrics.train_loss` is the mean over this many last steps.
LAST_STEPS: Final = 20
# transformers' "constant" ignores the warm-up.
_SCHEDULES: Final = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}

#: Called after a step that is not the last: (step, what takes a snapshot). May raise to end the run.
AfterStep = Callable[[int, Callable[[], Snapshot]], None]


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a run reached. `train_loss`: mean per target token over its last steps. `before` is the base's validation,
    `best` that of the adapter which is kept; both None without validation data."""

    train_loss: float
    before: Validation | None
    best: Validation | None


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a fit did. `steps`: those taken; `best_step`: the one whose adapter is kept; `stopped_early`: by `patience`;
    `tokens` counts prompts and completions that were trained on."""

    metrics: Metrics
    steps: int
    best_step: int
    stopped_early: bool
    tokens: int


def fit(
    model: nn.Module,
    data: Dataset,
    config: LoopConfig,
    *,
    steps: int,
    pad: int,
    record: Callable[[Record], None],
    resume: Snapshot | None = None,
    after_step: AfterStep = lambda _step, _take: None,
) -> Fitted:
    """Runs up to `steps` steps on the parameters of `model` that require gradients; leaves it in eval mode, with the
    best adapter where there is validation data, else with the last.

    Raises:
        FailedPrecondition: a loss or a gradient that is not finite; the adapter is of no use then.
    """
    run = _Run(model, data, config, steps=steps, pad=pad, record=record)
    if resume is None:
        run.evaluate_base()
    else:
        run.restore(resume)
    for batches in run.batches():
        run.learn(batches)
        if run.step % config.eval_every == 0 or run.step == steps:
            run.evaluate()
        if run.selection.exhausted or run.step == steps:
            break
        after_step(run.step, run.snapshot)
    return run.finish()


class _Run:
    """Model, optimiser, schedule and counters of one fit: everything that a snapshot holds."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        config: LoopConfig,
        *,
        steps: int,
        pad: int,
        record: Callable[[Record], None],
    ) -> None:
        self._model, self._data, self._config = model, data, config
        self._steps, self._pad, self._record = steps, pad, record
        self._learner = _Learner(model, config, steps)
        self.selection = Selection(config.best_metric, config.patience, config.min_delta)
        self._started = time.monotonic()
        self.step = 0
        self._tokens = 0
        self._before: Validation | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=LAST_STEPS)

    def batches(self) -> Iterator[list[Batch]]:
        """The batches of each step that is left, without end."""
        size = self._config.gradient_accumulation
        source = training_batches(self._data.train, self._config.batch_size, self._pad, self._config.seed)
        source = islice(source, self.step * size, None)
        while True:
            yield list(islice(source, size))

    def learn(self, batches: list[Batch]) -> None:
        """One step."""
        rate = self._learner.rate
        loss, norm = self._learner.learn(batches)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _diverged(self.step + 1, f"loss is {loss}, gradient norm {norm}", rate)
        self.step += 1
        self._tokens += sum(batch.tokens for batch in batches)
        self._recent.append((loss, sum(batch.target_tokens for batch in batches)))
        self._record(StepRecord(self.step, self._steps, loss, rate, norm, self._tokens, self._seconds))

    def evaluate_base(self) -> None:
        """Measures before the first step. The untrained adapter is never the best: it would be the base."""
        self._before = self._validate()

    def evaluate(self) -> None:
        """Measures the adapter as it is now."""
        validation = self._validate()
        if validation is not None:
            self.selection.offer(self.step, validation, parts.copies(self._learner.parameters))

    def finish(self) -> Fitted:
        """Puts the best adapter into the model."""
        best = self.selection.best
        if best is not None:
            parts.put_back(self._learner.parameters, best.tensors)
        self._model.eval()
        train_loss = sum(loss * count for loss, count in self._recent) / sum(count for _, count in self._recent)
        return Fitted(
            Metrics(train_loss, self._before, best.validation if best else None),
            steps=self.step,
            best_step=best.step if best else self.step,
            stopped_early=self.step < self._steps,
            tokens=self._tokens,
        )

    def snapshot(self) -> Snapshot:
        """Everything that the steps to come depend on."""
        state = {
            "step": self.step,
            "tokens": self._tokens,
            "seconds": self._seconds,
            "recent": list(self._recent),
            "before": self._before and asdict(self._before),
            "selection": self.selection.state(),
            "schedule": parts.schedule_state(self._learner.schedule),
        }
        best = self.selection.best.tensors if self.selection.best else {}
        tensors = self._learner.tensors() | parts.under("best", best) | parts.random_tensors(self._learner.device)
        return Snapshot(state, tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Stands where `snapshot` was taken."""
        state, tensors = snapshot
        self._learner.restore(state["schedule"], tensors)
        self.selection.restored(state["selection"], parts.part(tensors, "best"))
        self.step, self._tokens = state["step"], state["tokens"]
        self._started = time.monotonic() - state["seconds"]
        self._before = state["before"] and Validation(**state["before"])
        self._recent.extend((loss, count) for loss, count in state["recent"])
        parts.restore_random(tensors, self._learner.device)

    def _validate(self) -> Validation | None:
        if not self._data.validation:
            return None
        validation = validate(self._model, self._data.validation, self._config.batch_size, self._pad)
        if not math.isfinite(validation.loss):
            raise _diverged(self.step, f"validation loss is {validation.loss}", self._learner.rate)
        self._record(EvalRecord.of(validation, self.step, self._steps, self._tokens, self._seconds))
        return validation

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started


class _Learner:
    """Optimiser and schedule over a model's trainable parameters."""

    def __init__(self, model: nn.Module, config: LoopConfig, steps: int) -> None:
        self._model = model
        self.parameters = parts.trainable(model)
        self._names = list(self.parameters)
        self.device = next(iter(self.parameters.values())).device
        self._max_norm = config.max_grad_norm
        # One group: LoRA has matrices only, nothing that must be kept from decay.
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.schedule = get_scheduler(
            _SCHEDULES[config.schedule],
            self._optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=steps,
        )

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def learn(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """One step; returns the loss per target token of all `batches` before it, and the gradients' norm before
        clipping. Each batch's sum is divided by the targets of all: the gradient is that of one big batch.

        A loss or norm that is not finite changes nothing.
        """
        self._model.train()
        count = sum(batch.target_tokens for batch in batches)
        total = 0.0
        for batch in batches:
            loss = completion_loss(self._model, batch.to(self.device)) / count
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self._max_norm).item()
        if math.isfinite(total) and math.isfinite(norm):
            self._optimizer.step()
            self.schedule.step()
        self._optimizer.zero_grad()
        return total, norm

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of the adapter and of the optimiser's state, see `snapshot`."""
        adapter = parts.under("adapter", parts.copies(self.parameters))
        return adapter | parts.optimizer_tensors(self._optimizer, self._names)

    def restore(self, schedule: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Takes on what `tensors` and the schedule's state were."""
        parts.put_back(self.parameters, parts.part(tensors, "adapter"))
        parts.restore_schedule(self.schedule, schedule)
        parts.restore_optimizer(self._optimizer, self._names, tensors, self.rate)


def _diverged(step: int, what: str, rate: float) -> FailedPrecondition:
    return FailedPrecondition(
        f"training diverged at step {step}: {what} (learning rate {rate:.2e}); "
        "lower train.learning_rate or raise train.warmup_steps. Nothing was written",
        reason="DIVERGED",
    )
