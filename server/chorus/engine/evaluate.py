"""Runs the base over a step's rows and says what came of it: new tokens, their log-probabilities, the prompts'.

Changes nothing until it returns, so a step that failed can be run again, whole or in parts, with the same result.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from chorus.engine.layout import Layout
from chorus.engine.logprobs import Wanted, is_finite, logprobs_of
from chorus.engine.messages import TokenLogprob
from chorus.engine.runner import Runner
from chorus.engine.sampler import NOT_FINITE, sample
from chorus.engine.sequence import Key


class Drawn(NamedTuple):
    """A new token, and its log-probability where `sampling.logprobs` asks for it."""

    token: int
    logprob: TokenLogprob | None


class Evaluation(NamedTuple):
    """What each sequence that samples has drawn.

    The token is `NOT_FINITE` where the row that it should be drawn from is not finite, or one that scores the prompt; a
    sequence that has such a row is here even if it does not sample yet. It has to fail.
    """

    tokens: dict[Key, Drawn]


def evaluate(runner: Runner, layout: Layout, eos_token_ids: frozenset[int]) -> Evaluation:
    """One step: computes all rows, draws a token for each that samples, adds to `prompt_logprobs` what was scored.

    Raises whatever the forward pass raises; `prompt_logprobs` are as they were then.
    """
    logits = runner.forward(layout)
    scores = _score(logits, layout)
    tokens = _draw(logits, layout, eos_token_ids)
    for scored, logprobs in zip(layout.scored, scores, strict=True):
        if is_finite(logprobs):
            scored.seq.prompt_logprobs += logprobs
        else:
            tokens[scored.seq.key] = Drawn(NOT_FINITE, None)
    return Evaluation(tokens)


def _score(logits: Tensor, layout: Layout) -> list[list[TokenLogprob]]:
    """For each of `layout.scored`, the log-probabilities of its tokens."""
    for seq, _, positions in layout.scored:
        due = seq.sampling.prompt_logprobs_from + len(seq.prompt_logprobs)
        if positions.start + 1 != due:  # what is told later would be told of the wrong tokens
            raise RuntimeError(f"request {seq.request_id}: token {due} of its prompt was passed over, unscored")
    wanted = [
        Wanted(scored.first + i, token, scored.seq.sampling.prompt_logprobs or 0)
        for scored in layout.scored
        for i, token in enumerate(scored.tokens)
    ]
    entries = iter(logprobs_of(logits, wanted))
    return [[next(entries) for _ in scored.positions] for scored in layout.scored]


def _draw(logits: Tensor, layout: Layout, eos_token_ids: frozenset[int]) -> dict[Key, Drawn]:
    sequences = [chunk.seq for chunk in layout.sampled]
    tokens = sample(_sampled_rows(logits, layout), sequences, eos_token_ids)
    asking = [i for i, seq in enumerate(sequences) if seq.sampling.logprobs is not None and tokens[i] != NOT_FINITE]
    wanted = [Wanted(layout.sampled_at[i], tokens[i], sequences[i].sampling.logprobs or 0) for i in asking]
    logprobs = dict(zip(asking, logprobs_of(logits, wanted), strict=True))
    return {seq.key: Drawn(tokens[i], logprobs.get(i)) for i, seq in enumerate(sequences)}


def _sampled_rows(logits: Tensor, layout: Layout) -> Tensor:
    if not layout.scored:
        return logits
    return logits.index_select(0, torch.tensor(layout.sampled_at, dtype=torch.int64, device=logits.device))
