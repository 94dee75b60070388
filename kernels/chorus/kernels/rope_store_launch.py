"""Launches `qk_norm_rope_store`, as a custom op. No argument is checked here, and nothing waits for the device.

CHORUS_KERNELS_DEBUG=1 compiles the kernel with its assertion: slots within the cache.
"""

import torch
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels import triton_rope_store as kernels
from chorus.kernels.low_rank_launch import launch_options
from chorus.kernels.pointwise_tuning import ROPE_WARPS, rope_heads


@torch.library.custom_op("chorus::qk_norm_rope_store", mutates_args=("k_cache", "v_cache"))
def qk_norm_rope_store_op(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    kind: str,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """`reference.qk_norm_rope_store`; `kind` is "" without norms. Returns the queries [T, H, D]."""
    rows, total, dim = qkv.shape
    blocks, kv_heads, block, _ = k_cache.shape
    heads = total - 2 * kv_heads
    query = qkv.new_empty(rows, heads, dim)
    block_h = rope_heads(dim)
    with torch.cuda.device_of(qkv):
        kernels.qk_norm_rope_store[(rows, -(-heads // block_h) + 2 * -(-kv_heads // block_h))](
            qkv_ptr=qkv,
            query_ptr=query,
            k_cache_ptr=k_cache,
            v_cache_ptr=v_cache,
            cos_ptr=cos,
            sin_ptr=sin,
            slots_ptr=slots,
            q_weight_ptr=q_weight,
            k_weight_ptr=k_weight,
            qkv_stride=qkv.stride(0),
            angle_stride=cos.stride(0),
            slots_total=blocks * block,
            eps=eps,
            HEADS=heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            BLOCK=block,
            ROTARY=2 * cos.shape[1],
            KIND=kind,
            INTERLEAVED=interleaved,
            LIMIT=reference.KV_LIMIT,
            BLOCK_H=block_h,
            BLOCK_D=1 << (dim - 1).bit_length(),
            **launch_options(ROPE_WARPS, 1),
        )
    return query


@qk_norm_rope_store_op.register_fake
def _(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    kind: str,
    eps: float,
    interleaved: bool,
) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * k_cache.shape[1], qkv.shape[2])
