"""The steps: loss on completions, AdamW, schedule, validation.

Knows batches and a model that takes `logits_to_keep`. Does not know where either came from or where the result goes.

Plain torch, no accelerate. Speed did not decide: its steps took 5 % and 14 % longer in two rounds on a busy machine,
and it adds nothing to start-up (peft imports it anyway). But what would be used of it is `.to`, `backward` and
`clip_grad_norm_`, while its device and precision are one choice per process: a bfloat16 run after a float32 one raises,
and the demo trains three tenants in one process. It comes in with the first run on more than one device.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import get_scheduler

from chorus.errors import FailedPrecondition
from chorus.trainer.batches import IGNORED, Batch, evaluation_batches, training_batches
from chorus.trainer.config import LoopConfig
from chorus.trainer.data import Dataset, Encoded
from chorus.trainer.records import EvalRecord, Record, StepRecord

#: `Metrics.train_loss` is the mean over this many last steps.
LAST_STEPS: Final = 20
# transformers' "constant" ignores the warm-up.
_SCHEDULES: Final = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True, slots=True)
class Metrics:
    """Mean losses per target token; validation's are None without validation data."""

    train_loss: float
    validation_loss_before: float | None
    validation_loss: float | None


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a fit measured; `tokens` counts prompts and completions that were trained on."""

    metrics: Metrics
    tokens: int


def fit(
    model: nn.Module, data: Dataset, config: LoopConfig, *, steps: int, pad: int, record: Callable[[Record], None]
) -> Fitted:
    """Runs `steps` steps on the parameters of `model` that require gradients; leaves it in eval mode.

    Raises:
        FailedPrecondition: a loss or a gradient that is not finite; the adapter is of no use then.
    """
    learner = _Learner(model, config, steps)
    started = time.monotonic()
    tokens = 0
    recent: deque[tuple[float, int]] = deque(maxlen=LAST_STEPS)

    def validate(step: int) -> float | None:
        if not data.validation:
            return None
        loss = validation_loss(model, data.validation, config.batch_size, pad)
        if not math.isfinite(loss):
            raise _diverged(step, f"validation loss is {loss}", learner.rate)
        record(EvalRecord(step, steps, loss, tokens, time.monotonic() - started))
        return loss

    before = after = validate(0)
    batches = training_batches(data.train, config.batch_size, pad, config.seed)
    for step, batch in enumerate(islice(batches, steps), 1):
        rate = learner.rate
        loss, norm = learner.learn(batch)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _diverged(step, f"loss is {loss}, gradient norm {norm}", rate)
        tokens += batch.tokens
        recent.append((loss, batch.target_tokens))
        record(StepRecord(step, steps, loss, rate, norm, tokens, time.monotonic() - started))
        if step % config.eval_every == 0 or step == steps:
            after = validate(step)
    model.eval()
    train_loss = sum(loss * count for loss, count in recent) / sum(count for _, count in recent)
    return Fitted(Metrics(train_loss, before, after), tokens)


def completion_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum, float32, of the cross entropy over the batch's targets; prompts and padding count nothing."""
    logits: Tensor = model(input_ids=batch.input_ids, logits_to_keep=batch.columns, use_cache=False).logits  # [B, K, V]
    return F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def validation_loss(model: nn.Module, examples: Sequence[Encoded], batch_size: int, pad: int) -> float:
    """Mean loss per target token over all `examples`; leaves `model` in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for batch in evaluation_batches(examples, batch_size, pad):
        total += completion_loss(model, batch.to(device)).item()
        count += batch.target_tokens
    return total / count


class _Learner:
    """Optimiser and schedule over a model's trainable parameters."""

    def __init__(self, model: nn.Module, config: LoopConfig, steps: int) -> None:
        self._model = model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._device = self._parameters[0].device
        self._max_norm = config.max_grad_norm
        # One group: LoRA has matrices only, nothing that must be kept from decay.
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._schedule = get_scheduler(
            _SCHEDULES[config.schedule],
            self._optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=steps,
        )

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def learn(self, batch: Batch) -> tuple[float, float]:
        """One step; returns the loss per target token before it, and the gradients' norm before clipping.

        A loss or norm that is not finite changes nothing.
        """
        self._model.train()
        loss = completion_loss(self._model, batch.to(self._device)) / batch.target_tokens
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        values = loss.item(), norm.item()
        if all(map(math.isfinite, values)):
            self._optimizer.step()
            self._schedule.step()
        self._optimizer.zero_grad()
        return values


def _diverged(step: int, what: str, rate: float) -> FailedPrecondition:
    return FailedPrecondition(
        f"training diverged at step {step}: {what} (learning rate {rate:.2e}); "
        "lower train.learning_rate or raise train.warmup_steps. Nothing was written",
        reason="DIVERGED",
    )
