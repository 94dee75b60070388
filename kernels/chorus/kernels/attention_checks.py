"""What the attention operators refuse, on the host and before anything runs; nothing here waits for a device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from chorus.kernels.row_lists import RowLists
from chorus.kernels.types import AttentionRow


def sound_lists(rows: Sequence[AttentionRow], block_size: int, causal: bool) -> RowLists:
    """The rows as lists: rows in order without gaps, contexts that hold their tokens, tables that hold their contexts.

    Raises:
        ValueError: naming what of the rows is wrong.
    """
    at = 0
    for row in rows:
        if row.start != at or row.end <= row.start:
            raise ValueError(f"rows: one is [{row.start}, {row.end}), the ones before end at {at}")
        at = row.end
        if row.context < (row.end - row.start if causal else 1):
            raise ValueError(f"rows: a context of {row.context} does not hold {row.end - row.start} new tokens")
        if len(row.blocks) * block_size < row.context:
            raise ValueError(f"rows: {len(row.blocks)} blocks of {block_size} do not hold a context of {row.context}")
    lists = RowLists(rows, block_size, causal)
    if (lowest := min(lists.pages, default=0)) < 0:
        raise ValueError(f"rows: block {lowest} is none of a cache")
    return lists


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, tokens: int, device: torch.device, names: tuple[str, str]
) -> None:
    """query [T, H, D]; key, value [.., H_kv, .., D] of one shape, the query's dtype and the plan's device; their names.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if query.dim() != 3 or query.shape[0] != tokens or not query.is_floating_point():
        raise ValueError(f"query: want [{tokens}, H, D] in floating point, got {tuple(query.shape)} of {query.dtype}")
    if key.shape != value.shape:
        raise ValueError(f"{names[1]}: {tuple(value.shape)} is not the shape of the keys, {tuple(key.shape)}")
    if key.shape[-1] != query.shape[2] or query.shape[1] % key.shape[1]:
        raise ValueError(f"query: {tuple(query.shape)} does not fit keys {tuple(key.shape)}: heads of a key head, D")
    on, dtype = query.device, query.dtype
    if on != device and on.type != device.type:  # a plan's "cuda" is a tensor's "cuda:0"
        raise ValueError(f"query: {dtype} on {on}, want {dtype} on {device}")
    for name, tensor in ((names[0], key), (names[1], value)):
        if tensor.dtype != dtype or tensor.device != on:
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, want {dtype} on {on}")


def check_cache(k_cache: Tensor, block_size: int, highest_block: int) -> None:
    """k_cache [blocks, H_kv, block_size, D], the plan's block size, all of its blocks in it.

    Raises:
        ValueError: naming the cache or the rows.
    """
    if k_cache.dim() != 4 or k_cache.shape[2] != block_size:
        raise ValueError(f"k_cache: want [blocks, H_kv, {block_size}, D], got {tuple(k_cache.shape)}")
    if highest_block >= k_cache.shape[0]:
        raise ValueError(f"rows: block {highest_block} is none of a cache of {k_cache.shape[0]}")


def check_scores(window: int | None, soft_cap: float | None, bias: Tensor | None, query: Tensor) -> None:
    """window and soft_cap positive; bias [H, 2 * distances + 1], float32.

    Raises:
        ValueError: naming the argument.
    """
    if window is not None and window < 1:
        raise ValueError(f"window: want at least 1, got {window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap: want more than 0, got {soft_cap}")
    if bias is None:
        return
    fits = bias.dim() == 2 and bias.shape[0] == query.shape[1] and bias.shape[1] % 2 == 1
    if not fits or bias.dtype != torch.float32 or bias.device != query.device or not bias.is_contiguous():
        raise ValueError(
            f"bias: want a contiguous [{query.shape[1]}, 2 * distances + 1] in float32 on {query.device}, "
            f"got {tuple(bias.shape)} of {bias.dtype} on {bias.device}"
        )


def check_store(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, ends: tuple[int, int] | None = None
) -> None:
    """key, value [T, H_kv, D] for caches [blocks, H_kv, block_size, D]; slots [T] int64. Looked into on CPU only.

    `ends` are the lowest and the highest slot, where they are known.

    Raises:
        ValueError: naming the argument.
    """
    if k_cache.dim() != 4 or v_cache.shape != k_cache.shape:
        raise ValueError(f"v_cache: want keys' and values' caches of one shape, got {k_cache.shape}, {v_cache.shape}")
    want = (slots.shape[0], k_cache.shape[1], k_cache.shape[3])
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != want:
            raise ValueError(f"{name}: want {want}, got {tuple(tensor.shape)}")
    for name, tensor in (("key", key), ("value", value), ("v_cache", v_cache)):
        if tensor.dtype != k_cache.dtype or tensor.device != k_cache.device:
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, want {k_cache.dtype} on {k_cache.device}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache.is_contiguous():
            raise ValueError(f"{name}: want a contiguous tensor")
    if slots.dtype != torch.int64 or slots.dim() != 1 or slots.device != key.device or not slots.is_contiguous():
        raise ValueError(f"slots: want a contiguous [T], int64 on {key.device}, got {slots.dtype} {tuple(slots.shape)}")
    if slots.device.type == "cpu" and len(slots):
        lowest, highest = (int(slot) for slot in torch.aminmax(slots)) if ends is None else ends
        if lowest < 0 or highest >= k_cache.shape[0] * k_cache.shape[2]:
            raise ValueError(f"slots: {lowest} to {highest} do not lie in {k_cache.shape[0]} blocks")
