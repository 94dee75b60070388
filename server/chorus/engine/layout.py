"""How a step's chunks lie in the packed batch: sorted by adapter, so that routing is a short list of segments.

    slot:     none   0     0     2        2
    rows:   | dec |dec| prefill |dec|  prefill  |      -> segments (1..6, slot 0), (6..11, slot 2)
    logits:   ^    ^         ^   ^   ^ ^ ^ ^ ^         -> a second, shorter table for lm_head
              sampled: the last row of each chunk that samples
                                     scored: rows that predict prompt tokens whose log-probabilities were asked for

Knows sequences and numbers, no tensors.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from chorus.engine import sequence
from chorus.engine.schedule import Chunk
from chorus.kernels import AttentionRow, SlotSegment


class Scored(NamedTuple):
    """Logits of a sequence's `positions`, each of which predicts the token after it, from row `first` of L on."""

    seq: sequence.Sequence
    first: int
    positions: range

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.seq.prompt[self.positions.start + 1 : self.positions.stop + 1]


class Layout(NamedTuple):
    """One packed batch of T rows. Of L of them, `logit_rows`, the logits are computed: S are sampled, others scored.

    `sampled` lists the chunks that sample, in row order; the logits of `sampled[i]` are row `sampled_at[i]` of L.
    `lengths` says for each entry of `rows` how many tokens its sequence has, those still to compute among them.

    Of a step behind one that has not ended, `carried` says for each row which of the tokens drawn there is its own, and
    `token_ids` are zeros. It is empty where the tokens are known.
    """

    token_ids: list[int]
    carried: list[int]
    positions: list[int]
    rows: list[AttentionRow]
    lengths: list[int]
    segments: tuple[SlotSegment, ...]
    logit_rows: list[int]
    logit_segments: tuple[SlotSegment, ...]
    sampled: list[Chunk]
    sampled_at: list[int]
    scored: list[Scored]

    @property
    def wants_all(self) -> bool:
        """Whether the logits of all T rows are wanted, which are in order then."""
        return len(self.logit_rows) == len(self.token_ids)


def lay_out(chunks: Sequence[Chunk], before: Sequence[Chunk] = ()) -> Layout:
    """Sorts chunks by adapter slot and lays their tokens out row by row; within an adapter they keep their order.

    Behind the chunks `before`, whose draws are not known, each chunk is of the one token that its sequence draws there.
    """
    draws = {chunk.seq: i for i, chunk in enumerate(before)}
    carried: list[int] = []
    chunks = sorted(chunks, key=lambda chunk: chunk.seq.slot)
    token_ids: list[int] = []
    positions: list[int] = []
    rows: list[AttentionRow] = []
    logit_rows: list[int] = []
    logit_counts: list[tuple[int, int]] = []
    sampled_at: list[int] = []
    scored: list[Scored] = []
    for chunk in chunks:
        first, logits_before = len(token_ids), len(logit_rows)
        if before:
            carried.append(draws[chunk.seq])
            token_ids.append(0)
        else:
            token_ids += chunk.seq.token_slice(chunk.start, chunk.count)
        positions += range(chunk.start, chunk.start + chunk.count)
        rows.append(AttentionRow(first, len(token_ids), chunk.start + chunk.count, chunk.seq.blocks))
        if untold := chunk.seq.untold_rows(chunk.start, chunk.count):
            scored.append(Scored(chunk.seq, len(logit_rows), untold))
            logit_rows += range(first + untold.start - chunk.start, first + untold.stop - chunk.start)
        if chunk.samples:
            sampled_at.append(len(logit_rows))
            logit_rows.append(len(token_ids) - 1)
        logit_counts.append((chunk.seq.slot, len(logit_rows) - logits_before))
    return Layout(
        token_ids=token_ids,
        carried=carried,
        positions=positions,
        rows=rows,
        lengths=[max(chunk.seq.length, chunk.start + chunk.count) for chunk in chunks],
        segments=_segments((chunk.seq.slot, chunk.count) for chunk in chunks),
        logit_rows=logit_rows,
        logit_segments=_segments(logit_counts),
        sampled=[chunk for chunk in chunks if chunk.samples],
        sampled_at=sampled_at,
        scored=scored,
    )


def _segments(counts: Iterable[tuple[int, int]]) -> tuple[SlotSegment, ...]:
    """Of (slot, rows) in row order: one segment for each slot that has rows."""
    segments = []
    start = 0
    for slot, group in groupby(counts, key=lambda count: count[0]):
        end = start + sum(rows for _, rows in group)
        if slot >= 0 and end > start:
            segments.append(SlotSegment(start, end, slot))
        start = end
    return tuple(segments)
