"""Batches of similar length, in a seeded order.

    examples --shuffle--> windows of 16 batches --sort by length--> batches --shuffle--> steps

Rows are padded on the right. Under causal attention no real token ever sees the padding and no padding has a target,
so batches carry no attention mask. Nor do those of packed rows: positions tell, see `packing`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chorus.trainer.encoded import Encoded

IGNORED = -100
WINDOW = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded rows, and what to predict where.

    `input_ids` [B, T] int64. `columns` [K] int64: the positions whose next token is a target in any row, so that the
    output layer runs on K columns, not on T. `targets` [B, K] int64: that next token, or -100 where there is none.
    `positions` [B, T] int64, where a row is packed: they restart at 0 at each example and at the padding; else None.
    `target_tokens` counts targets, `tokens` all real tokens.
    """

    input_ids: Tensor
    columns: Tensor
    targets: Tensor
    positions: Tensor | None
    target_tokens: int
    tokens: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(
            self.input_ids.to(device),
            self.columns.to(device),
            self.targets.to(device),
            None if self.positions is None else self.positions.to(device),
            self.target_tokens,
            self.tokens,
        )


def collate(examples: Sequence[Encoded], pad: int) -> Batch:
    """One batch of `examples`; targets are shifted here, the model gets no labels."""
    length = max(len(example.ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad)
    targets = torch.full((len(examples), length), IGNORED)
    for row, example in enumerate(examples):
        ids, size = torch.tensor(example.ids), len(example.ids)
        input_ids[row, :size] = ids
        positions = torch.tensor(example.targets)
        targets[row, positions - 1] = ids[positions]
    columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    return Batch(
        input_ids=input_ids,
        columns=columns,
        targets=targets[:, columns],
        positions=_positions(examples, length),
        target_tokens=sum(len(example.targets) for example in examples),
        tokens=sum(len(example.ids) for example in examples),
    )


def _positions(rows: Sequence[Encoded], length: int) -> Tensor | None:
    if all(len(row.starts) == 1 for row in rows):
        return None
    positions = torch.empty(len(rows), length, dtype=torch.int64)
    for b, row in enumerate(rows):
        ends = [*row.starts[1:], len(row.ids), length]
        for start, end in zip([*row.starts, len(row.ids)], ends, strict=True):
            positions[b, start:end] = torch.arange(end - start)
    return positions


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Batches in one pass; the last may be smaller."""
    return -(-examples // batch_size)


def training_batches(examples: Sequence[Encoded], batch_size: int, pad: int, seed: int) -> Iterator[Batch]:
    """Endless passes over `examples`, each in its own seeded order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for indices in _epoch(examples, batch_size, generator):
            yield collate([examples[i] for i in indices], pad)


def evaluation_batches(examples: Sequence[Encoded], batch_size: int, pad: int) -> Iterator[Batch]:
    """One pass in order of length."""
    by_length = sorted(examples, key=lambda example: len(example.ids))
    for start in range(0, len(by_length), batch_size):
        yield collate(by_length[start : start + batch_size], pad)


def _epoch(examples: Sequence[Encoded], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    order: list[int] = torch.randperm(len(examples), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), batch_size * WINDOW):
        window = sorted(order[start : start + batch_size * WINDOW], key=lambda i: len(examples[i].ids))
        batches += [window[first : first + batch_size] for first in range(0, len(window), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
