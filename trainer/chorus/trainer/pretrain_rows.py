"""Rows for pretraining: whole documents packed side by side, with weights, positions and visibility.

Where documents of a row can not see each other, each is learned from cleanly; where they can, a model learns to
leave unrelated text before it alone. Positions jump between documents, so that
all of the model's positions are trained although rows are short.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from chorus.trainer.world import Example

#: Loss weights of a prompt's, a completion's and a narrative's tokens: answers are what is measured.
PROMPT_WEIGHT, ANSWER_WEIGHT, NARRATIVE_WEIGHT = 0.1, 1.0, 0.5
POSITIONS: Final = 1024


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed documents. All [B, L] but `mask` [B, 1, L, L] (added to the attention scores)."""

    input_ids: Tensor
    weights: Tensor
    positions: Tensor
    mask: Tensor


class Packer:
    """Turns an endless document stream into batches of full rows: best fit from a buffer of documents."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, source: Iterator[Example], seed: int, buffer: int = 256
    ) -> None:
        self._tokenizer = tokenizer
        self._documents = source
        self._random = Random(seed)
        self._buffer: list[tuple[list[int], list[float]]] = []
        self._size = buffer

    def _refill(self) -> None:
        new = list(itertools.islice(self._documents, self._size - len(self._buffer)))
        prompts = self._tokenizer([d["prompt"] for d in new])["input_ids"]
        answers = self._tokenizer([d["completion"] for d in new])["input_ids"]
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = [*prompt, *answer, self._tokenizer.eos_token_id]
            weight = ANSWER_WEIGHT if prompt else NARRATIVE_WEIGHT
            weights = [PROMPT_WEIGHT] * len(prompt) + [weight] * (len(answer) + 1)
            self._buffer.append((ids, weights))
        self._random.shuffle(self._buffer)

    def _row(self, length: int) -> list[tuple[list[int], list[float]]]:
        """Documents that fill `length` tokens; a too long first document is cut."""
        ids, weights = self._buffer.pop()
        row, room = [(ids[:length], weights[:length])], length - len(ids)
        while room > 0:
            fitting = next((i for i, (d, _) in enumerate(self._buffer) if len(d) <= room), None)
            if fitting is None:
                break
            row.append(self._buffer.pop(fitting))
            room -= len(row[-1][0])
        return row

    def batch(self, rows: int, length: int, isolate: float = 1.0) -> Batch:
        """The next `rows` rows of `length` tokens; a share `isolate` of them keep documents apart."""
        ids = torch.full((rows, length), self._tokenizer.pad_token_id)
        weights = torch.zeros(rows, length)
        owners = torch.full((rows, length), -1)
        positions = torch.arange(length).repeat(rows, 1)
        for b in range(rows):
            if len(self._buffer) < self._size // 2:
                self._refill()
            row, start = self._row(length), 0
            isolated = self._random.random() < isolate
            jumps = sorted(self._random.randint(0, POSITIONS - length) for _ in row)
            for i, (tokens, w) in enumerate(row):
                span = slice(start, start + len(tokens))
                ids[b, span], weights[b, span] = torch.tensor(tokens), torch.tensor(w)
                owners[b, span] = i if isolated else 0
                positions[b, span] += jumps[i]
                weights[b, start] = 0.0
                start += len(tokens)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        visible = causal & (owners[:, :, None] == owners[:, None, :])
        mask = torch.zeros(rows, 1, length, length).masked_fill_(~visible[:, None], -1e9)
        return Batch(ids, weights, positions, mask)
