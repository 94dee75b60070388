"""How well a model completes: the loss that is learned from, and what validation measures besides.

Knows batches and a model that takes `logits_to_keep`. Does not know steps, or which metric decides (`selection`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chorus.trainer.batches import IGNORED, Batch, evaluation_batches
from chorus.trainer.encoded import Encoded
from chorus.trainer.packing import row_inputs


@dataclass(frozen=True, slots=True)
class Validation:
    """One pass over the validation set, EOS counted as a token of the completion.

    `loss`: mean cross entropy per target token, nats. `token_accuracy`: share of target tokens that are the likeliest,
    given the true ones before them. `exact_match`: share of examples of which every target token is; see `validate`.
    """

    loss: float
    token_accuracy: float
    exact_match: float


def completion_logits(model: Any, batch: Batch) -> Tensor:
    """Logits [B, K, V], float32, of the columns that have targets."""
    packed = {} if batch.positions is None else row_inputs(model.config.model_type, batch.positions, model.dtype)
    logits: Tensor = model(input_ids=batch.input_ids, logits_to_keep=batch.columns, use_cache=False, **packed).logits
    return logits.float()


def completion_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum, float32, of the cross entropy over the batch's targets; prompts and padding count nothing."""
    return _loss(completion_logits(model, batch), batch.targets)


@torch.no_grad()
def validate(model: nn.Module, examples: Sequence[Encoded], batch_size: int, pad: int) -> Validation:
    """Measures all `examples`; leaves `model` in eval mode.

    Nothing is generated for `exact_match`. Greedy decoding repeats a completion, token for token, exactly where each of
    its tokens is the likeliest after the true ones before it (by induction over the tokens), and those logits are here.
    """
    model.eval()
    device = next(model.parameters()).device
    loss, tokens, right_tokens, right_examples = 0.0, 0, 0, 0
    for batch in evaluation_batches(examples, batch_size, pad):
        moved = batch.to(device)
        logits = completion_logits(model, moved)
        has_target = moved.targets != IGNORED  # [B, K]
        right = (logits.argmax(-1) == moved.targets) & has_target
        loss += _loss(logits, moved.targets).item()
        tokens += batch.target_tokens
        right_tokens += int(right.sum())
        right_examples += int((right | ~has_target).all(dim=1).sum())
    return Validation(loss / tokens, right_tokens / tokens, right_examples / len(examples))


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
