"""Several examples in one row, so that little of a batch is padding.

Best fit, longest first, once for the whole run: what is in a row depends on the examples and the seed alone, and each
pass draws an order of rows as it draws one of examples. Positions restart at each example, and that is also how
transformers knows, where no attention mask is given, that an example sees nothing before its own start; sliding windows
are kept. OPT makes its mask without positions and is given one. A model that heeds neither is found out before the
first step.

Knows encoded examples and how to ask a model. Does not know batches.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chorus.errors import FailedPrecondition
from chorus.trainer.encoded import Encoded

FIELD = "data.packing"
_PROBE_TOKENS = 16
#: Of the largest logit. What is masked weighs exactly nothing; in another row, though, numbers round differently.
_LEAK = 1e-6
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def pack(examples: Sequence[Encoded], max_length: int, seed: int) -> list[Encoded]:
    """Rows of up to `max_length` tokens that hold each example once."""
    order: list[int] = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda i: -len(examples[i].ids))  # stable: those of one length stay shuffled
    rows: list[list[Encoded]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for example in (examples[i] for i in order):
        fitting = bisect_left(rooms, (len(example.ids), 0))
        room, row = rooms.pop(fitting) if fitting < len(rooms) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        insort(rooms, (room - len(example.ids), row))
    return [_row(row) for row in rows]


def fill(rows: Sequence[Encoded], max_length: int) -> float:
    """The share of the rows' `max_length` tokens that is not padding."""
    return sum(len(row.ids) for row in rows) / (len(rows) * max_length)


#: Model types that see example from example only by a mask: [B, 1, T, T] of floats, the square of a row.
_MASKED = frozenset({"opt"})


def row_inputs(model_type: str, positions: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a model takes beside the ids of packed rows; `positions` [B, T] restart where an example does."""
    if model_type not in _MASKED:
        return {"position_ids": positions}
    example = (positions == 0).cumsum(dim=1)
    order = torch.arange(positions.shape[1], device=positions.device)
    seen = (example[:, :, None] == example[:, None, :]) & (order[:, None] >= order)
    mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {"position_ids": positions, "attention_mask": mask[:, None]}


def _row(examples: Sequence[Encoded]) -> Encoded:
    ids: tuple[int, ...] = ()
    targets: list[int] = []
    starts = []
    for example in examples:
        starts.append(len(ids))
        targets += [len(ids) + position for position in example.targets]
        ids += example.ids
    return Encoded(ids, tuple(targets), tuple(starts))


@torch.no_grad()
def check_honoured(model: PreTrainedModel, max_length: int) -> None:
    """Asks `model`, in eval mode, about two sequences in one row.

    Raises:
        FailedPrecondition: the second is not what it is alone, or changes with the first; names the model's type.
    """
    kind = model.config.model_type
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    short = rope.get("original_max_position_embeddings") or max_length
    if rope.get("rope_type") == "longrope" and max_length > short:
        raise _refusal(kind, f"above {short} tokens, its frequencies depend on what else is in the batch")
    size: int = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(size, (3, _PROBE_TOKENS), generator=generator).to(model.device)
    once = torch.arange(_PROBE_TOKENS, device=model.device)
    twice = torch.cat([once, once])
    try:
        alone = _logits(model, second, once)
        packed = [_logits(model, torch.cat([one, second]), twice)[_PROBE_TOKENS:] for one in (first, other)]
    except TypeError:
        raise _refusal(kind, "it takes no positions") from None
    scale = float(alone.abs().max())
    if float((packed[0] - packed[1]).abs().max()) > _LEAK * scale:
        raise _refusal(kind, "an example in a row would see the one before it")
    if float((packed[0] - alone).abs().max()) > _ROUNDING[model.dtype] * scale:
        raise _refusal(kind, "an example in a row would not be what it is alone")


def _logits(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """Float32 [T, V] of one row."""
    inputs = row_inputs(model.config.model_type, positions[None], model.dtype)
    output: Any = model(input_ids=ids[None], use_cache=False, **inputs)
    logits: Tensor = output.logits[0].float()
    return logits


def _refusal(kind: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{FIELD}: models of type {kind!r} can not learn from packed rows: {why}; set it to false",
        reason="UNSUPPORTED_PACKING",
        field=FIELD,
    )
