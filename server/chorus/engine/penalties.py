"""Changes logits before a token is chosen: logit_bias, then penalties, then what min_tokens forbids.

As vLLM means it. The repetition penalty divides a positive logit and multiplies a negative one, once for each token of
prompt or output; then the frequency penalty is taken off for each time that a token is in the output, and the presence
penalty once. Greedy rows are changed alike.

Works on the few (row, token) pairs that are concerned, all rows at once; the rest of the vocabulary is not read.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from chorus.engine.messages import Sampling
from chorus.engine.sequence import Sequence
from chorus.engine.token_counts import TokenCounts


def changes_logits(seq: Sequence) -> bool:
    """Whether this sequence's next token depends on anything but the model's own logits."""
    sampling = seq.sampling
    return bool(sampling.logit_bias) or _penalises(sampling) or len(seq.output) < sampling.min_tokens


def apply(logits: Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int]) -> None:
    """Changes float32 logits [S, V] in place, row i as `sequences[i]` asks. Finite ones stay finite or become -inf."""
    _add_bias(logits, sequences)
    _penalise(logits, sequences)
    _ban_early_stops(logits, sequences, eos_token_ids)


def _penalises(sampling: Sampling) -> bool:
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0 or sampling.repetition_penalty != 1


def _add_bias(logits: Tensor, sequences: Seq[Sequence]) -> None:
    rows = [row for row, seq in enumerate(sequences) if seq.sampling.logit_bias]
    if rows:
        pairs = [np.array(sequences[row].sampling.logit_bias, dtype=np.float64) for row in rows]
        of_row = np.repeat(rows, [len(p) for p in pairs])
        tokens, biases = np.concatenate(pairs).T
        at = _upload(of_row, logits), _upload(tokens.astype(np.int64), logits)
        logits.index_put_(at, _upload(biases.astype(np.float32), logits), accumulate=True)


def _penalise(logits: Tensor, sequences: Seq[Sequence]) -> None:
    rows = [row for row, seq in enumerate(sequences) if _penalises(seq.sampling)]
    if not rows:
        return
    counts = [_counts(sequences[row]) for row in rows]
    sizes = [len(c.ids) for c in counts]

    def spread(name: str) -> Tensor:
        values = np.array([getattr(sequences[row].sampling, name) for row in rows], dtype=np.float64)
        return _upload(np.repeat(values, sizes), logits)

    at = _upload(np.repeat(rows, sizes), logits), _upload(np.concatenate([np.array(c.ids) for c in counts]), logits)
    count = _upload(np.concatenate([np.array(c.counts) for c in counts]), logits)
    repetition = spread("repetition_penalty")
    before = logits[at]
    after = torch.where(before > 0, before / repetition, before * repetition)
    after -= spread("frequency_penalty") * count + spread("presence_penalty") * (count > 0)
    largest = torch.finfo(logits.dtype).max  # a huge penalty must not make a good row look broken
    logits[at] = torch.where(before.isinf(), before, after.clamp(-largest, largest).to(logits.dtype))


def _upload(values: np.ndarray, beside: Tensor) -> Tensor:
    return torch.from_numpy(values).to(beside.device)


def _counts(seq: Sequence) -> TokenCounts:
    """Of all its tokens if any of its penalties is for the prompt's too, else of its output."""
    if seq.counts is None:
        seq.counts = TokenCounts(seq.prompt if seq.sampling.repetition_penalty != 1 else ())
    seq.counts.follow(seq.output)
    return seq.counts


def _ban_early_stops(logits: Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int]) -> None:
    """Rows under their min_tokens can not draw what would end them."""
    bans = [
        (row, token)
        for row, seq in enumerate(sequences)
        if len(seq.output) < seq.sampling.min_tokens
        for token in eos_token_ids | seq.sampling.stop_token_ids
    ]
    if bans:
        rows, tokens = zip(*bans, strict=True)
        logits[torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)] = float("-inf")
