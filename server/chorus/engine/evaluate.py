"""Runs the base over a step's rows and says what came of it: new tokens, their log-probabilities, the prompts'.

`launch` gives a step to the device, `read` says what came of it. Nothing is changed until `read` returns, so a step
that failed can be run again, whole or in parts, with the same result.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.engine.graphs import carry
from chorus.engine.layout import Layout
from chorus.engine.logprobs import Logprobs, Wanted, is_finite
from chorus.engine.messages import TokenLogprob
from chorus.engine.readback import Readback
from chorus.engine.runner import Runner
from chorus.engine.sampler import NOT_FINITE, draw
from chorus.engine.sequence import Key
from chorus.kernels.upload import to_device


class Drawn(NamedTuple):
    """A new token, and its log-probability where `sampling.logprobs` asks for it."""

    token: int
    logprob: TokenLogprob | None


class Launched:
    """A step that has been given to the device, with all that is asked of its logits. `read` waits for it.

    `drawn` [S] are the tokens of `layout.sampled` on the device, for the rows of the next step. A graph's logits are
    its next replay's, so nobody looks at them afterwards.

    Raises:
        RuntimeError: a token of a prompt would be passed over, unscored.
    """

    def __init__(self, layout: Layout, logits: Tensor, tokens: Tensor) -> None:
        self.layout, self.drawn = layout, tokens
        self._scores = _of_prompts(logits, layout) if layout.scored else None
        sampling = [chunk.seq.sampling for chunk in layout.sampled]
        self._asking = [i for i, asked in enumerate(sampling) if asked.logprobs is not None]
        self._logprobs = _of_tokens(logits, tokens, layout, self._asking) if self._asking else None
        self._tokens: Readback[int] = Readback(tokens)

    def read(self) -> dict[Key, Drawn]:
        """What each sequence that samples has drawn; adds to `prompt_logprobs` what was scored.

        The token is `NOT_FINITE` where the row that it should be drawn from is not finite, or one that scores the
        prompt; a sequence that has such a row is here even if it does not sample yet. It has to fail.

        Raises whatever the device raises; `prompt_logprobs` are as they were then.
        """
        tokens = self._tokens.read()
        logprobs = dict(zip(self._asking, self._logprobs.read(), strict=True)) if self._logprobs else {}
        drawn = {
            chunk.seq.key: Drawn(token, logprobs.get(i) if token != NOT_FINITE else None)
            for i, (chunk, token) in enumerate(zip(self.layout.sampled, tokens, strict=True))
        }
        if self._scores is not None:
            drawn |= self._add_scores(self._scores.read())
        return drawn

    def _add_scores(self, scores: Seq[TokenLogprob]) -> dict[Key, Drawn]:
        """Tells the sequences theirs, and gives those that have a row which is not finite."""
        broken, entries = {}, iter(scores)
        for scored in self.layout.scored:
            theirs = [next(entries) for _ in scored.positions]
            if is_finite(theirs):
                scored.seq.prompt_logprobs += theirs
            else:
                broken[scored.seq.key] = Drawn(NOT_FINITE, None)
        return broken


@torch.inference_mode()
def launch(runner: Runner, layout: Layout, eos_token_ids: frozenset[int], before: Launched | None = None) -> Launched:
    """Computes all rows of a step and draws a token for each that samples, without waiting for the device.

    `before` is the step that the layout's `carried` tokens are drawn in. Raises whatever the forward pass raises.
    """
    drawn = before.drawn if before else None
    logits = runner.forward(layout, drawn)
    pending = None if drawn is None else carry(drawn, _index(layout.carried, logits.device))
    tokens = draw(_sampled_rows(logits, layout), [chunk.seq for chunk in layout.sampled], eos_token_ids, pending)
    return Launched(layout, logits, tokens)


def _of_prompts(logits: Tensor, layout: Layout) -> Logprobs:
    """Of the prompts' tokens, for each of `layout.scored` in its order."""
    for seq, _, positions in layout.scored:
        due = seq.sampling.prompt_logprobs_from + len(seq.prompt_logprobs)
        if positions.start + 1 != due:  # what is told later would be told of the wrong tokens
            raise RuntimeError(f"request {seq.request_id}: token {due} of its prompt was passed over, unscored")
    wanted = [
        Wanted(scored.first + i, token, scored.seq.sampling.prompt_logprobs or 0)
        for scored in layout.scored
        for i, token in enumerate(scored.tokens)
    ]
    return Logprobs(logits, wanted)


def _of_tokens(logits: Tensor, tokens: Tensor, layout: Layout, asking: Seq[int]) -> Logprobs:
    """Of the tokens that are drawn, for those of `layout.sampled` that ask."""
    theirs = tokens.index_select(0, _index(asking, tokens.device)).clamp(min=0)  # NOT_FINITE is told of otherwise
    wanted = [Wanted(layout.sampled_at[i], 0, layout.sampled[i].seq.sampling.logprobs or 0) for i in asking]
    return Logprobs(logits, wanted, theirs)


def _sampled_rows(logits: Tensor, layout: Layout) -> Tensor:
    return logits.index_select(0, _index(layout.sampled_at, logits.device)) if layout.scored else logits


def _index(places: Seq[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(places, dtype=torch.int64), device)
