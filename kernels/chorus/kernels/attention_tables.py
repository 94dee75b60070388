"""What the attention kernels are told of a batch: items, merges, pages, as int32 tables built on the host.

    items   per (some new tokens of one sequence, a range of its context): 7 numbers, decodes first, then chunks
    merges  per decode row whose context was cut: where its parts are
    pages   all block tables, one after the other

Known on the host, uploaded at once. With a `Capacity` the tables have fixed sizes and places, so that a CUDA graph can
replay them; unused entries say "no tokens" and return at once.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.kernels.attention_tuning import DECODE, PREFILL, SPLIT_TOKENS
from chorus.kernels.types import AttentionRow

ITEM_FIELDS, MERGE_FIELDS = 7, 3


@dataclass(frozen=True, slots=True)
class Capacity:
    """The most that a batch may hold: ranges of decodes, items of chunks, decodes that are cut, their parts, pages."""

    decode_items: int
    prefill_items: int
    merges: int
    parts: int
    pages: int

    @classmethod
    def of_decodes(cls, rows: int, ranges: int, block_size: int) -> "Capacity":
        """Of any `rows` decodes whose contexts are cut into `ranges` together (`decode_ranges`), windows or not."""
        return cls(ranges, 0, rows, ranges, ranges * -(-SPLIT_TOKENS // block_size))


class Geometry(NamedTuple):
    """Where in the table what begins, and how much there is; plain integers, for a custom op."""

    decode_items: int
    prefill_at: int
    prefill_items: int
    merges_at: int
    merges: int
    parts: int
    pages_at: int


class AttentionTables(NamedTuple):
    tables: Tensor
    geometry: Geometry


class Item(NamedTuple):
    row: int
    tokens: int
    position: int
    """Of its first token."""
    first_page: int
    begin: int
    """First position of the range, the start of a page."""
    end: int
    part: int
    """Which partial result it gives; -1 where it gives the result."""


def attention_tables(
    rows: Sequence[AttentionRow],
    block_size: int,
    group: int,
    window: int | None,
    capacity: Capacity | None = None,
    *,
    causal: bool = True,
) -> AttentionTables:
    """Tables for a batch, on the host; `group` query heads share a key head.

    Without `causal` every token sees the whole context.

    Raises:
        ValueError: the batch is larger than the capacity.
    """
    decodes, chunks, merges, pages = array("i"), array("i"), array("i"), array("i")
    parts = 0
    for row in rows:
        first_page = len(pages)
        pages.extend(row.used(block_size))
        if row.end - row.start > 1:
            for item in _chunk_items(row, first_page, block_size, group, window, causal):
                chunks.extend(item)
            continue
        ranges = _ranges(row.context, block_size, window)
        if len(ranges) == 1:
            decodes.extend((row.start, 1, row.context - 1, first_page, *ranges[0], -1))
            continue
        for i, (begin, end) in enumerate(ranges):
            decodes.extend((row.start, 1, row.context - 1, first_page, begin, end, parts + i))
        merges.extend((row.start, parts, len(ranges)))
        parts += len(ranges)
    need = Capacity(
        len(decodes) // ITEM_FIELDS, len(chunks) // ITEM_FIELDS, len(merges) // MERGE_FIELDS, parts, len(pages)
    )
    have = capacity or need
    for field in Capacity.__slots__:
        if getattr(need, field) > getattr(have, field):
            raise ValueError(f"rows: need {getattr(need, field)} {field}, the capacity is {getattr(have, field)}")
    prefill_at = have.decode_items * ITEM_FIELDS
    merges_at = prefill_at + have.prefill_items * ITEM_FIELDS
    pages_at = merges_at + have.merges * MERGE_FIELDS
    host = torch.zeros(max(pages_at + have.pages, 1), dtype=torch.int32)
    for at, part in ((0, decodes), (prefill_at, chunks), (merges_at, merges), (pages_at, pages)):
        if part:
            host[at : at + len(part)] = torch.frombuffer(part, dtype=torch.int32)
    geometry = Geometry(have.decode_items, prefill_at, have.prefill_items, merges_at, have.merges, have.parts, pages_at)
    return AttentionTables(host, geometry)


def _chunk_items(
    row: AttentionRow, first_page: int, block_size: int, group: int, window: int | None, causal: bool
) -> Iterator[Item]:
    """Pieces of a chunk, each over all of the context that its tokens see."""
    tokens = tokens_of_tile(PREFILL.block_m, group)
    before = row.context - (row.end - row.start)
    for start in range(row.start, row.end, tokens):
        count = min(tokens, row.end - start)
        position = before + start - row.start
        first = 0 if window is None else max(position + 1 - window, 0) // block_size * block_size
        yield Item(start, count, position, first_page, first, position + count if causal else row.context, -1)


def _ranges(context: int, block_size: int, window: int | None) -> list[tuple[int, int]]:
    """What a decode sees, cut where multiples of SPLIT_TOKENS are."""
    begin = 0 if window is None else max(context - window, 0) // block_size * block_size
    cuts = range((begin // SPLIT_TOKENS + 1) * SPLIT_TOKENS, context, SPLIT_TOKENS)
    return list(pairwise((begin, *cuts, context)))


def decode_ranges(context: int) -> int:
    """Into how many ranges a decode over so many tokens is cut."""
    return -(-context // SPLIT_TOKENS)


def tokens_of_tile(block_m: int, group: int) -> int:
    """New tokens that fit into a tile of `block_m` rows, a row for each query head."""
    return max(block_m // heads_of_tile(group), 1)


def heads_of_tile(group: int) -> int:
    """Query heads of a key head, rounded up to a power of two."""
    return 1 << (group - 1).bit_length()


def rows_of_tile(family_rows: int, group: int) -> int:
    """Rows of a tile: at least one token's heads."""
    return max(family_rows, heads_of_tile(group))


def decode_rows_of_tile(group: int) -> int:
    return rows_of_tile(DECODE.block_m, group)
