"""Log-probabilities of tokens under the model's own distribution, and those of its likeliest.

In slices of rows: a prompt of 2,000 tokens over a vocabulary of 150,000 would take 1.2 GB at once, and again for ranks.
"""

import math
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.engine.messages import TokenLogprob
from chorus.engine.ranking import top

SLICE_BYTES = 64 * 2**20
# The rows' copies as they are and in float32, their log-probabilities, and what puts equal ones in order.
BYTES_PER_LOGIT = 24


class Wanted(NamedTuple):
    """The log-probability of `token` by row `row` of the logits, and of the row's `top` likeliest."""

    row: int
    token: int
    top: int


def logprobs_of(logits: Tensor, wanted: Seq[Wanted]) -> list[TokenLogprob]:
    """One for each wanted, from logits [L, V] as the model gave them; NaN where a row is not finite.

    Computed in float32. Likeliest first, of equal ones the smaller id first; all of them if V is smaller than `top`.
    """
    step = max(SLICE_BYTES // (BYTES_PER_LOGIT * logits.shape[-1]), 1)
    return [entry for at in range(0, len(wanted), step) for entry in _slice(logits, wanted[at : at + step])]


def is_finite(logprobs: Seq[TokenLogprob]) -> bool:
    """Whether the rows that gave these held neither NaN nor infinity, nor only -inf."""
    return not any(math.isnan(entry.logprob) for entry in logprobs)


@torch.inference_mode()
def _slice(logits: Tensor, wanted: Seq[Wanted]) -> list[TokenLogprob]:
    rows = torch.tensor([w.row for w in wanted], device=logits.device)
    tokens = torch.tensor([w.token for w in wanted], device=logits.device)
    logprobs = logits.index_select(0, rows).log_softmax(dim=-1, dtype=torch.float32)
    own = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
    most = min(max(w.top for w in wanted), logits.shape[-1])
    if most == 0:
        return [TokenLogprob(value) for value in own]
    ids = top(logprobs, most)
    ranked = zip(ids.tolist(), logprobs.gather(-1, ids).tolist(), strict=True)
    return [
        TokenLogprob(value, tuple(zip(row_ids, row_values, strict=True))[: w.top])
        for w, value, (row_ids, row_values) in zip(wanted, own, ranked, strict=True)
    ]
