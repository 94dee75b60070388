"""Runs the base over a step's rows and says what came of it: new tokens, their log-probabilities, the prompts'.

`launch` gives a step to the device, `read` says what came of it. Nothing is changed until `read` returns, so a step
that failed can be run again, whole or in parts, with the same result.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from chorus.engine.layout import Layout
from chorus.engine.logprobs import Wanted, is_finite, logprobs_of
from chorus.engine.messages import TokenLogprob
from chorus.engine.readback import Readback
from chorus.engine.runner import Runner
from chorus.engine.sampler import NOT_FINITE, draw, needs_host
from chorus.engine.sequence import Key


class Drawn(NamedTuple):
    """A new token, and its log-probability where `sampling.logprobs` asks for it."""

    token: int
    logprob: TokenLogprob | None


class Launched:
    """A step that has been given to the device. `read` waits for it.

    `drawn` [S] are the tokens of `layout.sampled` on the device, for the rows of the next step; None where that can not
    be laid out before this one is read, because the host has a part in it.
    """

    def __init__(self, layout: Layout, logits: Tensor, tokens: Tensor) -> None:
        self.layout = layout
        self.drawn = None if _needs_host(layout) else tokens
        # A graph's logits are its next replay's, so nobody looks at them once the next step is launched.
        self._logits = logits if self.drawn is None else None
        self._tokens = Readback(tokens)

    def read(self) -> dict[Key, Drawn]:
        """What each sequence that samples has drawn; adds to `prompt_logprobs` what was scored.

        The token is `NOT_FINITE` where the row that it should be drawn from is not finite, or one that scores the
        prompt; a sequence that has such a row is here even if it does not sample yet. It has to fail.

        Raises whatever the device raises; `prompt_logprobs` are as they were then.
        """
        tokens = self._tokens.read()
        if self._logits is None:
            return {chunk.seq.key: Drawn(token, None) for chunk, token in zip(self.layout.sampled, tokens, strict=True)}
        scores = _score(self._logits, self.layout)
        drawn = _with_logprobs(self._logits, tokens, self.layout)
        for scored, logprobs in zip(self.layout.scored, scores, strict=True):
            if is_finite(logprobs):
                scored.seq.prompt_logprobs += logprobs
            else:
                drawn[scored.seq.key] = Drawn(NOT_FINITE, None)
        return drawn


@torch.inference_mode()
def launch(runner: Runner, layout: Layout, eos_token_ids: frozenset[int], before: Launched | None = None) -> Launched:
    """Computes all rows of a step and draws a token for each that samples, as far as that goes without waiting.

    `before` is the step that the layout's `carried` tokens are drawn in. Raises whatever the forward pass raises.
    """
    drawn = before.drawn if before else None
    logits = runner.forward(layout, drawn)
    sequences = [chunk.seq for chunk in layout.sampled]
    tokens = draw(_sampled_rows(logits, layout), sequences, eos_token_ids, ahead=int(drawn is not None))
    return Launched(layout, logits, tokens)


def _needs_host(layout: Layout) -> bool:
    """Whether the step, or one more token of each that samples, takes the host to compute."""
    sequences = [chunk.seq for chunk in layout.sampled]
    return bool(layout.scored) or any(seq.sampling.logprobs is not None or needs_host(seq) for seq in sequences)


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


def _with_logprobs(logits: Tensor, tokens: list[int], layout: Layout) -> dict[Key, Drawn]:
    sequences = [chunk.seq for chunk in layout.sampled]
    asking = [i for i, seq in enumerate(sequences) if seq.sampling.logprobs is not None and tokens[i] != NOT_FINITE]
    wanted = [Wanted(layout.sampled_at[i], tokens[i], sequences[i].sampling.logprobs or 0) for i in asking]
    logprobs = dict(zip(asking, logprobs_of(logits, wanted), strict=True))
    return {seq.key: Drawn(tokens[i], logprobs.get(i)) for i, seq in enumerate(sequences)}


def _sampled_rows(logits: Tensor, layout: Layout) -> Tensor:
    if not layout.scored:
        return logits
    return logits.index_select(0, torch.tensor(layout.sampled_at, dtype=torch.int64, device=logits.device))
