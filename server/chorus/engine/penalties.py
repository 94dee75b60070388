"""Changes logits before a token is chosen: logit_bias, then penalties, then what min_tokens forbids.

As vLLM means it. The repetition penalty divides a positive logit and multiplies a negative one, once for each token of
prompt or output; then the frequency penalty is taken off for each time that a token is in the output, and the presence
penalty once. Greedy rows are changed alike.

Works on the few (row, token) pairs that are concerned, all rows at once; the rest of the vocabulary is not read.

Counts are the host's (`chorus.engine.token_counts`) and are uploaded for each step. Behind a step that has not been
read they lack its token, `pending`, which is on the device: it is counted there.

    uploaded   token    7  11  13   5              pending 11
               count    0   0   2   1
    counted    token    7  11  13   5 | 11         a pair for the pending token, whether it is among the others or not;
               count    0   1   2   1 |  1         where it is, both pairs say the same

Nothing here waits for the device.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from chorus.engine.messages import Sampling
from chorus.engine.sequence import Sequence
from chorus.engine.token_counts import TokenCounts
from chorus.kernels.upload import to_device


def changes_logits(seq: Sequence, ahead: int = 0) -> bool:
    """Whether its next token, `ahead` tokens after those of its output, depends on more than the model's own logits."""
    sampling = seq.sampling
    return bool(sampling.logit_bias) or _penalises(sampling) or _bans(seq, ahead)


def apply(
    logits: Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int], pending: Tensor | None = None
) -> None:
    """Changes float32 logits [S, V] in place, row i as `sequences[i]` asks. Finite ones stay finite or become -inf.

    `pending` [S] are the tokens that each has drawn since, if they are not in the outputs yet.
    """
    _add_bias(logits, sequences)
    _penalise(logits, sequences, pending)
    _ban_early_stops(logits, sequences, eos_token_ids, ahead=int(pending is not None))


def _penalises(sampling: Sampling) -> bool:
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0 or sampling.repetition_penalty != 1


def _bans(seq: Sequence, ahead: int) -> bool:
    return len(seq.output) + ahead < seq.sampling.min_tokens


def _add_bias(logits: Tensor, sequences: Seq[Sequence]) -> None:
    rows = [row for row, seq in enumerate(sequences) if seq.sampling.logit_bias]
    if rows:
        pairs = [np.array(sequences[row].sampling.logit_bias, dtype=np.float64) for row in rows]
        of_row = np.repeat(rows, [len(p) for p in pairs])
        tokens, biases = np.concatenate(pairs).T
        at = _upload(of_row, logits), _upload(tokens.astype(np.int64), logits)
        logits.index_put_(at, _upload(biases.astype(np.float32), logits), accumulate=True)


def _penalise(logits: Tensor, sequences: Seq[Sequence], pending: Tensor | None) -> None:
    rows = [row for row, seq in enumerate(sequences) if _penalises(seq.sampling)]
    if not rows:
        return
    counts = [_counts(sequences[row]) for row in rows]
    sizes = [len(c.ids) for c in counts]
    # Behind all the others, a pair for each row's pending token.
    pairs_of = np.concatenate([np.repeat(rows, sizes), rows if pending is not None else []]).astype(np.int64)

    def spread(name: str) -> Tensor:
        values = np.array([getattr(seq.sampling, name) for seq in sequences], dtype=np.float64)
        return _upload(values, logits)[row]

    row = _upload(pairs_of, logits)
    token = _upload(np.concatenate([np.array(c.ids) for c in counts]), logits)
    count = _upload(np.concatenate([np.array(c.counts) for c in counts]), logits)
    if pending is not None:
        token, count = with_pending(row, token, count, pending)
    repetition = spread("repetition_penalty")
    before = logits[row, token]
    after = torch.where(before > 0, before / repetition, before * repetition)
    after -= spread("frequency_penalty") * count + spread("presence_penalty") * (count > 0)
    largest = torch.finfo(logits.dtype).max  # a huge penalty must not make a good row look broken
    logits[row, token] = torch.where(before.isinf(), before, after.clamp(-largest, largest).to(logits.dtype))


def with_pending(row: Tensor, token: Tensor, count: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and counts of all pairs, whose rows are `row` [P]: those of `token` and `count`, then a pending one a row.

    Pairs of the same row and token have the same count, so it does not matter which of them is written last.
    """
    known, own = len(token), pending[row]
    is_pending = (token == own[:known]).long()
    counted = torch.zeros_like(pending).index_add_(0, row[:known], is_pending * count)
    return torch.cat((token, own[known:])), torch.cat((count + is_pending, counted[row[known:]] + 1))


def _upload(values: np.ndarray, beside: Tensor) -> Tensor:
    return to_device(torch.from_numpy(values), beside.device)


def _counts(seq: Sequence) -> TokenCounts:
    """Of all its tokens if any of its penalties is for the prompt's too, else of its output."""
    if seq.counts is None:
        seq.counts = TokenCounts(seq.prompt if seq.sampling.repetition_penalty != 1 else ())
    seq.counts.follow(seq.output)
    return seq.counts


def _ban_early_stops(logits: Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int], ahead: int) -> None:
    """Rows under their min_tokens can not draw what would end them."""
    bans = [
        (row, token)
        for row, seq in enumerate(sequences)
        if _bans(seq, ahead)
        for token in eos_token_ids | seq.sampling.stop_token_ids
    ]
    if bans:
        rows, tokens = np.array(bans, dtype=np.int64).T.copy()
        nothing = torch.full((), float("-inf"), dtype=logits.dtype, device=logits.device)
        logits.index_put_((_upload(rows, logits), _upload(tokens, logits)), nothing)
