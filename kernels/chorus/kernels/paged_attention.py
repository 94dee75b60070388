"""`store_kv` and `paged_attention`: a packed batch of decodes and prefill chunks over a paged KV cache.

On CPU all decodes are one call of a kernel (`native.decode_attention`), and chunks one of another where it runs
(`native.prompt_attention`), but for those of a few tokens. Other chunks are computed as decodes if they are short, and
a long one is a call of its own: one gather of its pages and one SDPA, in pieces where there is a soft cap or a bias
(`dense_attention`).

On CUDA the Triton kernels run (`triton_attention`), decodes and chunks in two launches, over tables that the plan
(`attention_plan`) builds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.attention_checks import check_attention, check_cache, check_scores, check_store
from chorus.kernels.attention_plan import AttentionPlan
from chorus.kernels.attention_tuning import attend_tiles
from chorus.kernels.dense_attention import dense_attention
from chorus.kernels.dispatch import runs_native


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, ends: tuple[int, int] | None = None
) -> None:
    """Writes row t's key and value to cache position slots[t]; see `reference.store_kv`.

    `ends` are the lowest and the highest slot, where the caller knows them (`AttentionPlan.ends`).

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit; on CPU also slots outside of a cache.
    """
    check_store(key, value, k_cache, v_cache, slots, ends)
    if key.device.type == "cuda":
        from chorus.kernels.attention_launch import store_kv_op

        store_kv_op(key, value, k_cache, v_cache, slots)
        return
    if not runs_native(key):
        reference.store_kv(key, value, k_cache, v_cache, slots)
        return
    from chorus.kernels.native import rope_store as native  # numba is not everywhere

    key, value = (new if new.stride(2) == 1 else new.contiguous() for new in (key, value))
    native.store_kv(key, value, (k_cache, v_cache), slots)


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence's new tokens over its paged context; see `reference.paged_attention`.

    query [T, H, D]; caches [blocks, H_kv, block_size, D]; bias [H, 2 * distances + 1] float32, of `relative_bias`.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit the plan; a window or a bias where
            the tokens' positions in the context are not known.
    """
    check_attention(query, k_cache, v_cache, plan.tokens, plan.device, ("k_cache", "v_cache"))
    check_cache(k_cache, plan.block_size, plan.highest_block)
    check_scores(window, soft_cap, bias, query)
    if not plan.causal and (window is not None or bias is not None):
        raise ValueError(f"{'bias' if window is None else 'window'}: tokens have no position in another's context")
    if plan.runs_triton and attend_tiles(query.shape[2], query.dtype, ""):
        return _on_triton(query, k_cache, v_cache, plan, scale, window, soft_cap, bias)
    if not runs_native(query):
        return reference.paged_attention(
            query,
            k_cache,
            v_cache,
            plan.rows,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            bias=bias,
            causal=plan.causal,
        )
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1 or query.stride(2) != 1:
        raise ValueError(
            "query, k_cache, v_cache: want heads' numbers side by side and equal strides of the caches, "
            f"got {query.stride()}, {k_cache.stride()} and {v_cache.stride()}"
        )
    from chorus.kernels.native.decode_attention import decode_attention, few_keys
    from chorus.kernels.native.prompt_attention import prompt_attention, tiled_from

    least = tiled_from(query, k_cache) if bias is None else None
    group = query.shape[1] // k_cache.shape[1]
    batch = plan.on_cpu(few_keys(query, k_cache, capped=soft_cap is not None), window, group, least)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if batch.prompt_rows is not None:
        prompt_attention(out, query, k_cache, v_cache, batch.prompt_rows, scale=scale, window=window, soft_cap=soft_cap)
    if batch.decode_rows is not None:
        decode_attention(
            out, query, k_cache, v_cache, batch.decode_rows, scale=scale, window=window, soft_cap=soft_cap, bias=bias
        )
    for row, blocks in zip(batch.prefills, batch.prefill_blocks, strict=True):
        key, value = _gather(k_cache, blocks, row.context), _gather(v_cache, blocks, row.context)
        part = slice(row.start, row.end)
        out[part] = _prefill(query[part], key, value, scale, plan.causal, window, soft_cap, bias)
    return out


def _on_triton(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    bias: Tensor | None,
) -> Tensor:
    from chorus.kernels.attention_launch import paged_attention_op

    for name, tensor in (("query", query), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: want a contiguous tensor")
    tables, geometry = plan.tables(query.shape[1] // k_cache.shape[1], window)
    attended: Tensor = paged_attention_op(
        query, k_cache, v_cache, tables, geometry, scale, window or 0, soft_cap or 0.0, bias, plan.causal
    )
    return attended


def _gather(cache: Tensor, blocks: Tensor, context: int) -> Tensor:
    """[blocks, H_kv, block_size, D] by one sequence's table -> [1, H_kv, L, D]."""
    pages = cache.index_select(0, blocks).transpose(0, 1)  # [H_kv, B, block_size, D]
    return pages.flatten(1, 2)[None, :, :context]


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    bias: Tensor | None,
) -> Tensor:
    """query [n, H, D], key and value [1, H_kv, L, D]; returns [n, H, D]."""
    (count, heads, _), context = query.shape, key.shape[2]
    group = heads // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (key, value))
    q = query.transpose(0, 1)[None]  # [1, H, n, D]
    windowed = window is not None and window < context
    if causal and count == context and not windowed and soft_cap is None and bias is None:
        return F.scaled_dot_product_attention(q, key, value, is_causal=True, scale=scale)[0].transpose(0, 1)
    seen = None
    if causal:
        last = torch.arange(context - count, context)[:, None]
        position = torch.arange(context)[None, :]
        seen = position <= last
        if window is not None:
            seen &= position > last - window
        seen = seen[None, None]
    attended = dense_attention(
        q, key, value, scale=scale, seen=seen, soft_cap=soft_cap, bias=bias, first=context - count
    )
    return attended[0].transpose(0, 1)
