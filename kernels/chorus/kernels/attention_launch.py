"""Launches the attention kernels: `chorus::store_kv` and `chorus::paged_attention`, custom ops that torch.compile and
CUDA graphs take as they are. No argument is checked here, and nothing waits for the device.

CHORUS_KERNELS_DEBUG=1 compiles the kernels with their assertions: slots and pages within the cache, items in the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels import triton_attention as kernels
from chorus.kernels.attention_tables import Geometry, decode_rows_of_tile, heads_of_tile, rows_of_tile
from chorus.kernels.attention_tuning import PREFILL, STORE_COLUMNS, attend_tiles
from chorus.kernels.low_rank_launch import launch_options
from chorus.kernels.tuning import arch_of


@torch.library.custom_op("chorus::store_kv", mutates_args=("k_cache", "v_cache"))
def store_kv_op(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """`reference.store_kv`; the last axis of key and value is contiguous."""
    blocks, heads, block, dim = k_cache.shape
    with torch.cuda.device_of(key):
        kernels.store_kv[(key.shape[0], -(-heads * dim // STORE_COLUMNS))](
            key_ptr=key,
            value_ptr=value,
            k_cache_ptr=k_cache,
            v_cache_ptr=v_cache,
            slots_ptr=slots,
            key_stride_t=key.stride(0),
            key_stride_h=key.stride(1),
            value_stride_t=value.stride(0),
            value_stride_h=value.stride(1),
            slots_total=blocks * block,
            HEADS=heads,
            DIM=dim,
            BLOCK=block,
            LIMIT=reference.KV_LIMIT,
            BLOCK_C=STORE_COLUMNS,
            **launch_options(4, 1),
        )


@store_kv_op.register_fake
def _(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    return None


@torch.library.custom_op("chorus::paged_attention", mutates_args=())
def paged_attention_op(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    geometry: Sequence[int],
    scale: float,
    window: int,
    soft_cap: float,
    bias: Tensor | None = None,
    causal: bool = True,
    packed: bool = False,
) -> Tensor:
    """`reference.paged_attention` of a batch's `AttentionTables`; window and soft_cap 0 for none; bias in float32.

    `packed`: the pages are of one token and lie in the order of the tokens.
    """
    how = Geometry(*geometry)
    (_, heads, dim), (pages, kv_heads, block, _) = query.shape, k_cache.shape
    group = heads // kv_heads
    tiles = attend_tiles(dim, query.dtype, arch_of(query.device))
    assert tiles is not None, "no kernel is made for these heads"
    out = torch.empty_like(query)
    partial, lse = new_workspace(how.parts, heads, dim, query.device)
    block_d = 1 << (dim - 1).bit_length()
    families = ((0, how.decode_items, decode_rows_of_tile(group)), (how.prefill_at, how.prefill_items, PREFILL.block_m))
    with torch.cuda.device_of(query):
        for at, items, block_m in families:
            if not items:
                continue
            kernels.attend[(items, kv_heads)](
                query_ptr=query,
                k_cache_ptr=k_cache,
                v_cache_ptr=v_cache,
                out_ptr=out,
                partial_ptr=partial,
                lse_ptr=lse,
                bias_ptr=lse if bias is None else bias,
                items_ptr=tables[at:],
                pages_ptr=tables[how.pages_at :],
                rows_total=query.shape[0],
                pages_total=pages,
                scale=scale,
                window=window,
                soft_cap=soft_cap,
                furthest=0 if bias is None else bias.shape[1] // 2,
                KV_HEADS=kv_heads,
                GROUP=group,
                DIM=dim,
                BLOCK=block,
                BLOCK_M=rows_of_tile(block_m, group),
                BLOCK_G=heads_of_tile(group),
                BLOCK_N=tiles.block_n,
                BLOCK_D=max(block_d, 16),
                HAS_WINDOW=window > 0,
                HAS_CAP=soft_cap > 0,
                HAS_BIAS=bias is not None,
                CAUSAL=causal,
                PACKED=packed,
                **launch_options(tiles.warps, tiles.stages),
            )
        if how.merges:
            kernels.combine[(how.merges, heads)](
                out_ptr=out,
                partial_ptr=partial,
                lse_ptr=lse,
                merges_ptr=tables[how.merges_at :],
                HEADS=heads,
                DIM=dim,
                BLOCK_D=block_d,
                **launch_options(4, 1),
            )
    return out


@paged_attention_op.register_fake
def _(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    geometry: Sequence[int],
    scale: float,
    window: int,
    soft_cap: float,
    bias: Tensor | None = None,
    causal: bool = True,
    packed: bool = False,
) -> Tensor:
    return torch.empty_like(query)


def new_workspace(parts: int, heads: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial results [parts, H, D] and the logarithms of their weights [parts, H]; what is not written is not read."""
    partial = torch.empty(max(parts, 1), heads, dim, dtype=torch.float32, device=device)
    return partial, torch.empty(max(parts, 1), heads, dtype=torch.float32, device=device)
