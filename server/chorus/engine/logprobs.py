"""Log-probabilities of tokens under the model's own distribution, and those of its likeliest.

In slices of rows: a prompt of 2,000 tokens over a vocabulary of 150,000 would take 1.2 GB at once, and again for ranks.
Computed where the logits are, without waiting; whoever reads them waits.
"""

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.engine.messages import TokenLogprob
from chorus.engine.ranking import top
from chorus.engine.readback import Readback
from chorus.kernels.upload import to_device

SLICE_BYTES = 64 * 2**20
# The rows' copies as they are and in float32, their log-probabilities, and what puts equal ones in order.
BYTES_PER_LOGIT = 24


class Wanted(NamedTuple):
    """The log-probability of `token` by row `row` of the logits, and of the row's `top` likeliest."""

    row: int
    token: int
    top: int


class Logprobs:
    """One for each wanted, from logits [L, V] as the model gave them; NaN where a row is not finite.

    `tokens` on the logits' device stand for those of `wanted` where these are not known to the host. Computed in
    float32. Likeliest first, of equal ones the smaller id first; all of them if V is smaller than `top`.
    """

    def __init__(self, logits: Tensor, wanted: Seq[Wanted], tokens: Tensor | None = None) -> None:
        self._wanted = wanted
        if tokens is None:
            tokens = to_device(torch.tensor([w.token for w in wanted], dtype=torch.int64), logits.device)
        step = max(SLICE_BYTES // (BYTES_PER_LOGIT * logits.shape[-1]), 1)
        starts = range(0, len(wanted), step)
        self._slices = [_Slice(logits, wanted[at : at + step], tokens[at : at + step]) for at in starts]

    def read(self) -> list[TokenLogprob]:
        """Waits for them."""
        read = (found for part in self._slices for found in part.read())
        return [TokenLogprob(own, likeliest[: w.top]) for w, (own, likeliest) in zip(self._wanted, read, strict=True)]


def is_finite(logprobs: Seq[TokenLogprob]) -> bool:
    """Whether the rows that gave these held neither NaN nor infinity, nor only -inf."""
    return not any(math.isnan(entry.logprob) for entry in logprobs)


class _Slice:
    """Some of them, of rows that are in memory at a time."""

    @torch.inference_mode()
    def __init__(self, logits: Tensor, wanted: Seq[Wanted], tokens: Tensor) -> None:
        rows = to_device(torch.tensor([w.row for w in wanted]), logits.device)
        logprobs = logits.index_select(0, rows).log_softmax(dim=-1, dtype=torch.float32)
        most = min(max(w.top for w in wanted), logits.shape[-1])
        ids = top(logprobs, most) if most else rows.new_empty(len(wanted), 0)
        self._own = Readback[float](logprobs.gather(-1, tokens[:, None])[:, 0])
        self._ids = Readback[list[int]](ids)
        self._values = Readback[list[float]](logprobs.gather(-1, ids))

    def read(self) -> Iterator[tuple[float, tuple[tuple[int, float], ...]]]:
        """Each one's own, and the likeliest with theirs."""
        for own, ids, values in zip(self._own.read(), self._ids.read(), self._values.read(), strict=True):
            yield own, tuple(zip(ids, values, strict=True))
