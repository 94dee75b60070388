"""`packed_attention`: encoders' attention, sequences packed one after the other, each token seeing all of its own.

On CPU sequences of similar length are padded to one and are one call of SDPA: the calls grow with the logarithm of the
longest, not with the number of sequences. On CUDA the paged kernel runs, over pages of one token.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.kernels.attention_checks import check_attention, check_scores
from chorus.kernels.attention_tables import AttentionTables, Capacity, attention_tables
from chorus.kernels.attention_tuning import attend_tiles
from chorus.kernels.dense_attention import dense_attention
from chorus.kernels.dispatch import runs_triton
from chorus.kernels.types import AttentionRow
from chorus.kernels.upload import to_device

# How much longer than its shortest the longest sequence of a call may be.
PADDING = 1.25


class PaddedGroup(NamedTuple):
    """g sequences as a rectangle: rows of the pack [g * L], which of them are real [g * L], and as a mask if some are
    not."""

    token: Tensor
    real: Tensor
    seen: Tensor | None
    longest: int


class PackedPlan:
    """A batch of sequences of the given lengths, packed in that order; shared by all layers. Immutable once made.

    `triton` says whether Triton runs (on CUDA if None); a `capacity` gives its tables one size for all batches.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        capacity: Capacity | None = None,
        *,
        triton: bool | None = None,
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths: want sequences of at least 1 token, got {list(lengths)}")
        self.lengths = tuple(lengths)
        self.tokens = sum(lengths)
        self.device = device
        self.runs_triton = runs_triton(device, triton)
        self._capacity = capacity
        self._tables: dict[int, AttentionTables] = {}

    @cached_property
    def rows(self) -> list[AttentionRow]:
        """The sequences as rows over pages of one token."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [
            AttentionRow(end - length, end, length, range(end - length, end))
            for end, length in zip(ends, self.lengths, strict=True)
        ]

    @cached_property
    def groups(self) -> list[PaddedGroup]:
        """Sequences of similar length together."""
        by_length = sorted(self.rows, key=lambda row: row.context)
        return [_padded(group) for group in _similar(by_length)]

    def tables(self, group: int) -> AttentionTables:
        """For the Triton kernels, with `group` query heads to a key head."""
        if group not in self._tables:
            host, geometry = attention_tables(self.rows, 1, group, None, self._capacity, causal=False)
            self._tables[group] = AttentionTables(to_device(host, self.device), geometry)
        return self._tables[group]


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: PackedPlan, *, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Each token attends to all tokens of its sequence; see `reference.packed_attention`.

    query [T, H, D]; key, value [T, H_kv, D]; bias [H, 2 * distances + 1] float32, as `relative_bias` makes it.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit the plan.
    """
    if key.dim() != 3 or key.shape[0] != plan.tokens:
        raise ValueError(f"key: want [{plan.tokens}, H_kv, D], got {tuple(key.shape)}")
    check_attention(query, key, value, plan.tokens, plan.device, ("key", "value"))
    check_scores(None, None, bias, query)
    group = query.shape[1] // key.shape[1]
    if plan.runs_triton:
        if attend_tiles(query.shape[2], query.dtype, "") is None:
            raise ValueError(f"query: no kernel is made for heads of {query.shape[2]} in {query.dtype}")
        from chorus.kernels.attention_launch import paged_attention_op

        tables, geometry = plan.tables(group)
        pages = (t.contiguous()[:, :, None] for t in (key, value))
        attended: Tensor = paged_attention_op(
            query.contiguous(), *pages, tables, geometry, scale, 0, 0.0, bias, causal=False, packed=True
        )
        return attended
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for padded in plan.groups:
        q, k, v = (
            t.index_select(0, padded.token).view(-1, padded.longest, *t.shape[1:]).transpose(1, 2)
            for t in (query, key, value)
        )
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        done = dense_attention(q, k, v, scale=scale, seen=padded.seen, bias=bias).transpose(1, 2).flatten(0, 1)
        if padded.seen is None:
            out.index_copy_(0, padded.token, done)
        else:
            out.index_copy_(0, padded.token[padded.real], done[padded.real])
    return out


def _similar(rows: Sequence[AttentionRow]) -> Iterator[list[AttentionRow]]:
    """Rows, shortest first, cut where one is too long for the group that it would join."""
    group: list[AttentionRow] = []
    for row in rows:
        if group and row.context > PADDING * group[0].context:
            yield group
            group = []
        group.append(row)
    yield group


def _padded(rows: Sequence[AttentionRow]) -> PaddedGroup:
    """What pads a sequence is its own first token, which stays unseen."""
    longest = rows[-1].context
    length = torch.tensor([row.context for row in rows])[:, None]
    position = torch.arange(longest)[None, :]
    real = position < length  # [g, L]
    index = torch.tensor([row.start for row in rows])[:, None] + position * real
    seen = None if rows[0].context == longest else real[:, None, None, :]
    return PaddedGroup(index.flatten(), real.flatten(), seen, longest)
