"""How a step's chunks lie in the packed batch: sorted by adapter, so that routing is a short list of segments.

    slot:     none   0     0     2        2
    rows:   | dec |dec| prefill |dec|  prefill  |      -> segments (1..6, slot 0), (6..11, slot 2)
    sampled rows: the last row of each chunk that samples -> a second, shorter table for lm_head

Knows sequences and numbers, no tensors.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from chorus.adapters.pool import SlotSegment
from chorus.engine.scheduler import Chunk
from chorus.kernels import AttentionRow


class Layout(NamedTuple):
    """One packed batch of T rows, S of which are sampled. `sampled` lists the chunks that sample, in row order."""

    token_ids: list[int]
    positions: list[int]
    rows: list[AttentionRow]
    segments: tuple[SlotSegment, ...]
    sampled: list[Chunk]
    sample_rows: list[int]
    sample_segments: tuple[SlotSegment, ...]

    @property
    def slots(self) -> set[int]:
        return {segment.slot for segment in self.segments}


def lay_out(chunks: Sequence[Chunk]) -> Layout:
    """Sorts chunks by adapter slot and lays their tokens out row by row; within an adapter they keep their order."""
    chunks = sorted(chunks, key=lambda chunk: chunk.seq.slot)
    token_ids: list[int] = []
    positions: list[int] = []
    rows: list[AttentionRow] = []
    sample_rows: list[int] = []
    for chunk in chunks:
        first = len(token_ids)
        token_ids += chunk.seq.token_slice(chunk.start, chunk.count)
        positions += range(chunk.start, chunk.start + chunk.count)
        rows.append(AttentionRow(first, len(token_ids), chunk.start + chunk.count, chunk.seq.blocks))
        if chunk.samples:
            sample_rows.append(len(token_ids) - 1)
    sampled = [chunk for chunk in chunks if chunk.samples]
    return Layout(
        token_ids=token_ids,
        positions=positions,
        rows=rows,
        segments=_segments(chunks, lambda chunk: chunk.count),
        sampled=sampled,
        sample_rows=sample_rows,
        sample_segments=_segments(sampled, lambda _: 1),
    )


def _segments(chunks: Sequence[Chunk], rows_of: Callable[[Chunk], int]) -> tuple[SlotSegment, ...]:
    segments = []
    start = 0
    for slot, group in groupby(chunks, key=lambda c: c.seq.slot):
        end = start + sum(rows_of(chunk) for chunk in group)
        if slot >= 0:
            segments.append(SlotSegment(start, end, slot))
        start = end
    return tuple(segments)
