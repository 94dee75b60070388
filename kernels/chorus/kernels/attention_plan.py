"""`AttentionPlan`: what a batch's attention needs to know of it, made once a step and shared by all layers.

With a capacity its tables have one size and place for all batches of as many tokens, and are written anew in place: a
graph that was recorded with them replays any of these.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from chorus.kernels.attention_checks import sound_lists
from chorus.kernels.attention_tables import AttentionTables, Capacity, attention_tables
from chorus.kernels.dispatch import runs_triton
from chorus.kernels.row_lists import RowLists
from chorus.kernels.types import AttentionRow
from chorus.kernels.upload import to_device, write

FEW_KEYS = 1 << 14
"""Tokens of a chunk times its context, up to which a CPU computes it best as so many decodes: ms so and with SDPA, 2
cores of Zen 4, 16 heads of 64 over 4, bfloat16 without its instructions: 64 tokens of 64 0.21, 0.39; 128 of 128 0.55,
0.71; 8 of 1024 0.60, 2.8; but 64 of 512 2.3, 1.3."""


class CpuRows:
    """For a CPU: chunks in tiles together, where there are such; decodes together, chunks of few keys among them token
    by token; and other chunks one by one.

    In tiles are chunks of `tiled_from` tokens and more, with `group` query heads to a key head. With a capacity there
    are decodes alone.
    """

    def __init__(
        self,
        rows: Sequence[AttentionRow],
        lists: RowLists,
        few_keys: int,
        window: int | None,
        group: int,
        tiled_from: int | None,
        capacity: Capacity | None,
    ) -> None:
        from chorus.kernels.native.decode_attention import DecodeRows  # numba is not everywhere
        from chorus.kernels.native.prompt_attention import PromptRows

        tiled: list[AttentionRow] = []
        decodes: list[AttentionRow] = []
        self.prefills: list[AttentionRow] = []
        for row in rows:
            if capacity is not None or row.end - row.start == 1:
                decodes.append(row)
            elif tiled_from is not None and row.end - row.start >= tiled_from:
                tiled.append(row)
            else:
                (decodes if is_short(row, few_keys, window) else self.prefills).append(row)
        block_size, causal = lists.block_size, lists.causal
        own = lists if len(decodes) == len(rows) else RowLists(decodes, block_size, causal)
        self.decode_rows = DecodeRows(own, pages=None if capacity is None else capacity.pages) if decodes else None
        self.prompt_rows = PromptRows(tiled, block_size, group, causal=causal) if tiled else None
        self.prefill_blocks = [torch.tensor(row.used(block_size)) for row in self.prefills]


def is_short(row: AttentionRow, few_keys: int = FEW_KEYS, window: int | None = None) -> bool:
    """Whether a chunk is better computed token by token, each as a decode."""
    tokens, seen = row.end - row.start, min(row.context, window or row.context)
    return tokens == 1 or tokens * seen <= few_keys


class AttentionPlan:
    """One batch's attention work, shared by all layers: where new keys go, and who attends to what.

    `rows` lists the batch's sequences in order; together they cover rows 0..T. Without `causal` tokens see all of their
    context, which another sequence has stored (cross-attention); such a plan has no slots. `triton` says whether Triton
    runs (on CUDA if None); a `capacity` gives its tables one size for all batches, which then can be written anew.

    Raises:
        ValueError: rows out of order, or a table that does not hold its context.
    """

    def __init__(
        self,
        rows: Sequence[AttentionRow],
        block_size: int,
        device: torch.device,
        capacity: Capacity | None = None,
        *,
        causal: bool = True,
        triton: bool | None = None,
    ) -> None:
        lists = sound_lists(rows, block_size, causal)
        self.runs_triton = runs_triton(device, triton)
        self._capacity = capacity
        self._is_rewritable = capacity is not None and (self.runs_triton or device.type == "cpu")
        self._tables: dict[tuple[int, int | None], AttentionTables] = {}
        self._on_cpu: dict[tuple[int | None, ...], CpuRows] = {}
        self.rows = tuple(rows)
        self.block_size = block_size
        self.causal = causal
        self.device = device
        self.tokens = self.rows[-1].end if self.rows else 0
        self._lists = lists
        self.highest_block = lists.highest_block
        slots, self.ends = _slots(lists)
        self.slots = to_device(slots, device)  # [T]

    def rewrite(self, rows: Sequence[AttentionRow]) -> None:
        """Another batch of as many tokens into the same tables, on the current stream and without waiting.

        Raises:
            ValueError: not as many tokens, more than the capacity, or a plan without one; nothing is written then.
        """
        if not self._is_rewritable:
            raise ValueError("capacity: a plan without one is not written anew")
        lists = sound_lists(rows, self.block_size, self.causal)
        if not rows or rows[-1].end != self.tokens:
            raise ValueError(f"rows: they end at {rows[-1].end if rows else 0}, the plan's at {self.tokens}")
        made = {(group, window): self._made(rows, group, window) for group, window in self._tables}
        for on_cpu in self._on_cpu.values():
            if on_cpu.decode_rows is not None:
                on_cpu.decode_rows.rewrite(lists)
        self.rows, self._lists = tuple(rows), lists
        self.highest_block = lists.highest_block
        slots, self.ends = _slots(lists)
        write(self.slots, slots)
        for key, (tables, _) in made.items():
            write(self._tables[key].tables, tables)

    def tables(self, group: int, window: int | None) -> AttentionTables:
        """For the Triton kernels, with `group` query heads to a key head."""
        key = group, window
        if key not in self._tables:
            host, geometry = self._made(self.rows, group, window)
            self._tables[key] = AttentionTables(to_device(host, self.device), geometry)
        return self._tables[key]

    def _made(self, rows: Sequence[AttentionRow], group: int, window: int | None) -> AttentionTables:
        return attention_tables(rows, self.block_size, group, window, self._capacity, causal=self.causal)

    def on_cpu(self, few_keys: int, window: int | None, group: int = 1, tiled_from: int | None = None) -> CpuRows:
        """For what runs on a CPU without Triton; chunks that see at most so many keys are computed as decodes, those of
        `tiled_from` tokens and more in tiles."""
        how = few_keys, window, group, tiled_from
        key = how if self._capacity is None else ()
        if key not in self._on_cpu:
            self._on_cpu[key] = CpuRows(self.rows, self._lists, *how, self._capacity)
        return self._on_cpu[key]


def _slots(lists: RowLists) -> tuple[Tensor, tuple[int, int]]:
    """Cache position of every new token, in batch order, and the lowest and the highest; 0 and -1 of none."""
    slots = lists.slots
    return torch.tensor(slots, dtype=torch.int64), (min(slots, default=0), max(slots, default=-1))
