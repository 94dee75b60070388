"""`store_kv` and `paged_attention`: a packed batch of decodes and prefill chunks over a paged KV cache.

On CPU all decode rows are one call, which gathers nothing (`paged_decode`). A prefill chunk is a call of its own; one
with a soft cap runs on the specification.

On CUDA the Triton kernels run (`triton_attention`), decodes and chunks in two launches, over tables that the plan
builds (`attention_tables`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.attention_tables import AttentionTables, Capacity, attention_tables
from chorus.kernels.attention_tuning import attend_tiles
from chorus.kernels.paged_decode import DecodePages, decode_by_pages
from chorus.kernels.types import AttentionRow


class AttentionPlan:
    """One batch's attention work, shared by all layers: where new keys go, and who attends to what.

    `rows` lists the batch's sequences in order; together they cover rows 0..T. Immutable once made. `triton` says
    whether Triton runs (on CUDA if None); a `capacity` gives its tables one size for all batches.
    """

    def __init__(
        self,
        rows: Sequence[AttentionRow],
        block_size: int,
        device: torch.device,
        capacity: Capacity | None = None,
        *,
        triton: bool | None = None,
    ) -> None:
        self.runs_triton = device.type == "cuda" if triton is None else triton
        self._capacity = capacity
        self._tables: dict[tuple[int, int | None], AttentionTables] = {}
        self.rows = tuple(rows)
        self.block_size = block_size
        self.slots = torch.tensor(_slots(self.rows, block_size), dtype=torch.int64, device=device)  # [T]
        self.decodes = [row for row in self.rows if row.end - row.start == 1]
        self.prefills = [row for row in self.rows if row.end - row.start > 1]
        self.prefill_blocks = [torch.tensor(_used(row, block_size), device=device) for row in self.prefills]
        self.decode_rows = torch.tensor([row.start for row in self.decodes], dtype=torch.int64, device=device)  # [R]
        self._pages: dict[int | None, DecodePages] = {}

    def tables(self, group: int, window: int | None) -> AttentionTables:
        """For the Triton kernels, with `group` query heads to a key head."""
        key = group, window
        if key not in self._tables:
            made = attention_tables(self.rows, self.block_size, group, window, self.slots.device, self._capacity)
            self._tables[key] = made
        return self._tables[key]

    def decode_pages(self, window: int | None) -> DecodePages:
        """The pages that the decode rows see some of."""
        if window not in self._pages:
            self._pages[window] = DecodePages(self.decodes, self.block_size, window)
        return self._pages[window]


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Writes row t's key and value to cache position slots[t]; see `reference.store_kv`."""
    if key.device.type == "cuda":
        from chorus.kernels.attention_launch import store_kv_op

        store_kv_op(key, value, k_cache, v_cache, slots)
        return
    if key.shape[0] == 0:
        return
    block_size = k_cache.shape[2]
    at = slots // block_size, slots % block_size
    for cache, new in ((k_cache, key), (v_cache, value)):
        # One pass over the new rows tells that there is nothing to replace; a NaN is not <= either.
        sound = new.abs().amax() <= reference.KV_LIMIT
        cache.transpose(1, 2).index_put_(at, new if sound else torch.where(new.abs() <= reference.KV_LIMIT, new, 0))


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention of each sequence's new tokens over its paged context; see `reference.paged_attention`.

    Raises:
        ValueError: the query heads are not a multiple of the key heads, or the plan was made for another row count.
    """
    if query.shape[1] % k_cache.shape[1] or query.shape[0] != plan.slots.shape[0]:
        raise ValueError(
            f"query: {tuple(query.shape)} does not fit {k_cache.shape[1]} key heads and {plan.slots.shape[0]} rows"
        )
    if plan.runs_triton and attend_tiles(query.shape[2], query.dtype, ""):
        return _on_triton(query, k_cache, v_cache, plan, scale, window, soft_cap)
    if query.device.type != "cpu" or (soft_cap is not None and plan.prefills):
        return reference.paged_attention(
            query, k_cache, v_cache, plan.rows, scale=scale, window=window, soft_cap=soft_cap
        )
    if plan.decodes:
        pages = plan.decode_pages(window)
        attended = decode_by_pages(query, k_cache, v_cache, pages, scale=scale, soft_cap=soft_cap)
        if not plan.prefills:
            return attended
    out = torch.empty_like(query)
    if plan.decodes:
        out.index_copy_(0, plan.decode_rows, attended)
    for row, blocks in zip(plan.prefills, plan.prefill_blocks, strict=True):
        out[row.start : row.end] = _prefill(query[row.start : row.end], k_cache, v_cache, row, blocks, scale, window)
    return out


def _on_triton(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    from chorus.kernels.attention_launch import paged_attention_op

    for name, tensor in (("query", query), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not tensor.is_contiguous() or tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(f"{name}: want a contiguous tensor of the query's dtype on its device")
    tables, geometry = plan.tables(query.shape[1] // k_cache.shape[1], window)
    attended: Tensor = paged_attention_op(
        query, k_cache, v_cache, tables, geometry, scale, window or 0, soft_cap or 0.0
    )
    return attended


def _gather(cache: Tensor, tables: Tensor) -> Tensor:
    """[blocks, H_kv, block_size, D] by tables [R, B] -> [R, H_kv, B * block_size, D]."""
    (rows, count), (_, heads, block_size, dim) = tables.shape, cache.shape
    index = tables[:, None, :] * heads + torch.arange(heads)[:, None]  # [R, H_kv, B]
    return cache.view(-1, block_size, dim).index_select(0, index.flatten()).view(rows, heads, count * block_size, dim)


def _prefill(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    row: AttentionRow,
    blocks: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    count, heads = query.shape[:2]
    group = heads // k_cache.shape[1]
    key = _gather(k_cache, blocks[None])[:, :, : row.context]  # [1, H_kv, L, D]
    value = _gather(v_cache, blocks[None])[:, :, : row.context]
    key, value = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (key, value))
    q = query.transpose(0, 1)[None]  # [1, H, count, D]
    if row.context == count and (window is None or count <= window):
        attended = F.scaled_dot_product_attention(q, key, value, is_causal=True, scale=scale)
    else:
        last = torch.arange(row.context - count, row.context)[:, None]
        position = torch.arange(row.context)[None, :]
        visible = position <= last
        if window is not None:
            visible &= position > last - window
        attended = F.scaled_dot_product_attention(q, key, value, attn_mask=visible, scale=scale)
    return attended[0].transpose(0, 1)


def _slots(rows: Sequence[AttentionRow], block_size: int) -> list[int]:
    """Cache position of every new token, in batch order."""
    slots: list[int] = []
    for row in rows:
        if row.start != len(slots):
            raise ValueError(f"rows: one begins at {row.start}, the ones before end at {len(slots)}")
        first = row.context - (row.end - row.start)
        slots += [row.blocks[p // block_size] * block_size + p % block_size for p in range(first, row.context)]
    return slots


def _used(row: AttentionRow, block_size: int) -> Sequence[int]:
    """The blocks that hold the row's context."""
    return row.blocks[: -(-row.context // block_size)]
