"""The specification of every operator, in plain torch: short, slow, loops where the definition has a "for each".

What runs in production may be faster but must equal this. Works in any dtype, float64 included; computes in the dtype
of its inputs, so a float64 call is the exact answer up to rounding.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus.kernels.types import (
    Activation,
    AttentionRow,
    Epilogue,
    HeadActivation,
    HeadPool,
    HeadSegment,
    LowRankSegment,
    Norm,
    RankPool,
    SlotSegment,
)

GatedActivation = Literal["silu", "gelu_tanh"]

KV_LIMIT = 1e30
"""Larger keys and values are not kept: far over what any model means, and 1e8 under where a score overflows."""


def low_rank(
    y: Tensor, x: Tensor, pool: RankPool, segments: Sequence[LowRankSegment], epilogue: Epilogue | None = None
) -> Tensor:
    """y[t] += act(mid_scale * (x[t] A^T) + mid_bias) B for each row t of each segment, A and B being its pool rows.

    x [T, K], y [T, N] (changed in place and returned); pool.a [R, K], pool.b [R, N], pool.mid_scale [R]; `Epilogue`
    says what its vectors do. Rows of no segment are left as they are. x may also be token ids [T], int64 below K, which
    stand for one-hot rows: what an embedding reads.
    """
    e = epilogue or Epilogue()
    for segment in segments:
        index = torch.as_tensor(segment.pool_rows, device=x.device, dtype=torch.int64)
        a, b, scale = pool.a[index], pool.b[index], pool.mid_scale[index]  # [r, K], [r, N], [r]
        part = slice(segment.start, segment.end)
        middle = a[:, x[part]].T if x.dim() == 1 else x[part] @ a.T  # [t, r]
        middle = middle * scale.to(y.dtype)
        if e.mid_bias is not None:
            middle = middle + e.mid_bias[index].to(y.dtype)
        delta = activate(middle, segment.activation) @ b
        if segment.vector is None:
            y[part] += delta
            continue
        of = {name: vectors[segment.vector].to(y.dtype) for name, vectors in e.vectors.items()}  # [N] each
        delta = of.get("out_scale", 1) * (delta + of.get("out_bias", 0))
        y[part] = of.get("row_scale", 1) * (y[part] + delta) + of.get("row_add", 0)
    return y


def row_scale(y: Tensor, vectors: Tensor, segments: Sequence[SlotSegment]) -> Tensor:
    """y[t] *= vectors[slot] for each row t of each segment; y [T, N] changed in place and returned, vectors [slots, N].

    Here and in `row_add` and `row_select`, vectors may be of higher precision than y; the result is rounded once.
    """
    for s in segments:
        y[s.start : s.end] *= vectors[s.slot]
    return y


def row_add(y: Tensor, vectors: Tensor, segments: Sequence[SlotSegment]) -> Tensor:
    """y[t] += vectors[slot], otherwise as `row_scale`."""
    for s in segments:
        y[s.start : s.end] += vectors[s.slot]
    return y


def row_select(y: Tensor, vectors: Tensor, segments: Sequence[SlotSegment]) -> Tensor:
    """y[t] = vectors[slot], otherwise as `row_scale`."""
    for s in segments:
        y[s.start : s.end] = vectors[s.slot]
    return y


def head(
    x: Tensor, pool: HeadPool, segments: Sequence[HeadSegment], width: int, activation: HeadActivation = "tanh"
) -> Tensor:
    """Logits [T, width]: W h + b for each row of each segment, h being x[t] [K], or act(D x[t] + c) with a dense layer.

    0 past a segment's own labels, and in rows of no segment.
    """
    logits = x.new_zeros(x.shape[0], width)
    for s in segments:
        states, own = x[s.start : s.end], slice(s.first, s.first + s.labels)
        if s.dense is not None and pool.dense_weight is not None and pool.dense_bias is not None:
            states = head_activation(states @ pool.dense_weight[s.dense].T + pool.dense_bias[s.dense], activation)
        logits[s.start : s.end, : s.labels] = states @ pool.weight[own].T + pool.bias[own]
    return logits


def head_activation(x: Tensor, activation: HeadActivation) -> Tensor:
    """gelu in its exact form."""
    if activation == "tanh":
        return torch.tanh(x)
    return F.relu(x) if activation == "relu" else F.gelu(x)


def residual_norm(residual: Tensor, x: Tensor | None, norm: Norm, segments: Sequence[SlotSegment] = ()) -> Tensor:
    """residual += x, in place; returns norm(residual), [T, N]. Rows of a segment have its slot's weight and bias.

    "rms" is v / RMS(v), rounded, times weight; "rms_plus_one" v / RMS(v) times (1 + weight), rounded; "layer"
    (v - mean) / std times weight plus bias, rounded. eps is added to the mean square. Low precision is normed in
    float32.
    """
    if x is not None:
        residual += x
    dtype, wide = residual.dtype, torch.promote_types(residual.dtype, torch.float32)
    weight, bias = norm.weight.expand_as(residual).clone(), torch.zeros_like(residual)
    if norm.bias is not None:
        bias += norm.bias
    for s in segments:
        weight[s.start : s.end] = norm.weights[s.slot] if norm.weights is not None else norm.weight
        if norm.biases is not None:
            bias[s.start : s.end] = norm.biases[s.slot]
    h = residual.to(wide)
    if norm.kind == "layer":
        h = h - h.mean(dim=-1, keepdim=True)
    normed = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + norm.eps)
    if norm.kind == "rms":
        return normed.to(dtype) * weight
    return (normed * ((norm.kind == "rms_plus_one") + weight.to(wide)) + bias.to(wide)).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias + residual, rounded once; x [..., K], weight [N, K], bias [N], residual [..., N]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return (y if residual is None else y + residual).to(x.dtype)


def gated_mul(gate: Tensor, up: Tensor, activation: GatedActivation) -> Tensor:
    """silu(gate) * up, or gelu in its tanh form; the activation is rounded before the product. [T, N]."""
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return act * up


def activate(middle: Tensor, activation: Activation) -> Tensor:
    """As torch.nn.functional has them."""
    match activation:
        case Activation.RELU:
            return F.relu(middle)
        case Activation.GELU:
            return F.gelu(middle)
        case Activation.GELU_TANH:
            return F.gelu(middle, approximate="tanh")
        case Activation.SILU:
            return F.silu(middle)
        case Activation.TANH:
            return torch.tanh(middle)
    return middle


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Writes row t's key and value, [T, H_kv, D] each, to cache position slots[t] (block * block_size + offset).

    k_cache, v_cache [blocks, H_kv, block_size, D]. What is not finite or over KV_LIMIT is stored as 0: a masked
    position still enters the sums, its score with -inf added, its value times 0. A NaN left in a page, or a key whose
    score is +inf, would make NaN of the sums of the page's next owner, and of who pads a table with the page.
    """
    for t, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, k_cache.shape[2])
        k_cache[block, :, offset] = torch.where(key[t].abs().double() <= KV_LIMIT, key[t], 0)
        v_cache[block, :, offset] = torch.where(value[t].abs().double() <= KV_LIMIT, value[t], 0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary positions: (a, b) becomes (a cos - b sin, b cos + a sin) for each pair of the first R of D dimensions.

    x [T, H, D]; cos, sin [T, R / 2]. Pairs are (i, i + R / 2), or (2 i, 2 i + 1). Rounded once.
    """
    out, half = x.clone(), cos.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b = x[..., first].to(wide), x[..., second].to(wide)
    out[..., first] = (a * cos - b * sin).to(x.dtype)
    out[..., second] = (b * cos + a * sin).to(x.dtype)
    return out


def qk_norm_rope_store(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Norms each query and key over D, rotates it, stores keys and values; returns the queries [T, H, D].

    qkv [T, H + 2 H_kv, D]; caches [blocks, H_kv, block_size, D]; see `residual_norm`, `rotate`, `store_kv`.
    """
    kv_heads = k_cache.shape[1]
    query, key, value = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        query = residual_norm(query.flatten(0, 1), None, q_norm).view(query.shape)
        key = residual_norm(key.flatten(0, 1), None, k_norm).view(key.shape)
    store_kv(rotate(key, cos, sin, interleaved=interleaved), value, k_cache, v_cache, slots)
    return rotate(query, cos, sin, interleaved=interleaved)


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Sequence[AttentionRow],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention of each sequence's new tokens over its whole paged context, these tokens included; causal or not.

    query [T, H, D]; k_cache, v_cache [blocks, H_kv, block_size, D]; H is a multiple of H_kv, query heads of one key
    head are neighbours. The last (row.end - row.start) of row.context positions are the queries. `window` limits each
    query to the last `window` positions, itself included; `soft_cap` is c tanh(s / c) on the scores. `bias`
    [H, 2 m + 1] is added to the capped score, bias[h, m + d] where the key stands d positions after the query, d cut at
    m. Without `causal` each token sees the whole context, which then may be another sequence's. Returns [T, H, D].
    """
    out = torch.zeros_like(query)
    heads, kv_heads = query.shape[1], k_cache.shape[1]
    for row in rows:
        blocks = torch.as_tensor(row.blocks, device=query.device)
        key = k_cache[blocks].transpose(1, 2).flatten(0, 1)[: row.context]  # [L, H_kv, D]
        value = v_cache[blocks].transpose(1, 2).flatten(0, 1)[: row.context]
        key, value = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))  # [L, H, D]
        scores = torch.einsum("qhd,lhd->hql", query[row.start : row.end], key) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        last = torch.arange(row.context - (row.end - row.start), row.context, device=query.device)[:, None]
        position = torch.arange(row.context, device=query.device)[None, :]
        if bias is not None:
            furthest = bias.shape[1] // 2
            distance = (position - last).clamp(-furthest, furthest)  # [q, L]
            scores = scores + bias.to(scores.dtype)[:, distance + furthest]
        hidden = (position > last) & causal
        if window is not None:
            hidden |= position <= last - window
        scores = scores.masked_fill(hidden, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        out[row.start : row.end] = torch.einsum("hql,lhd->qhd", weights.to(value.dtype), value)
    return out


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Attention within each of several sequences that lie one after the other, all of a sequence seen by its tokens.

    query [T, H, D]; key, value [T, H_kv, D]; bias as of `paged_attention`. Returns [T, H, D].
    """
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    rows = [AttentionRow(end - n, end, n, range(end - n, end)) for end, n in zip(ends, lengths, strict=True)]
    return paged_attention(query, key[:, :, None], value[:, :, None], rows, scale=scale, bias=bias, causal=False)


def likeliest(logits: Tensor) -> Tensor:
    """The id of the largest of each row of logits [S, V], of equal ones the smallest id; -1 where the largest is not
    finite, or the row has NaN."""
    best, ids = logits.max(dim=-1)  # NaN where there is one; of equals the first
    return torch.where(torch.isfinite(best), ids, -1)


def filtered_draw(weights: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, noise: Tensor) -> Tensor:
    """Draws an id for each row of weights [R, V], which need not add up to 1, by its `noise` [R] in [0, 1).

    Likeliest first, of equal weights the smaller id first: `top_k` [R] tokens are kept, all where it is 0, or V or
    more; then of these, or of a row's `totals` [R] where all are, the shortest run with the share `top_p` [R], in
    (0, 1], at least one. Drawn is the first of them up to which there is more than the share `noise` of what is kept;
    -1 where there is nothing, or NaN. Masses are float64, and so are `top_p` and `noise`.
    """
    ids = weights.sort(dim=-1, descending=True, stable=True).indices
    ranked = weights.gather(-1, ids).double()
    place = torch.arange(weights.shape[-1], device=weights.device)
    limited = ((top_k > 0) & (top_k < weights.shape[-1]))[:, None]
    ranked = ranked.masked_fill(limited & (place >= top_k[:, None]), 0)
    reached = ranked.cumsum(dim=-1)
    wanted = torch.where(limited, reached[:, -1:], totals[:, None]) * top_p[:, None]
    ranked = ranked.masked_fill((reached - ranked >= wanted) & (top_p < 1)[:, None], 0)
    reached = ranked.cumsum(dim=-1)
    kept = reached[:, -1:]
    target = torch.minimum(noise[:, None] * kept, torch.nextafter(kept, torch.zeros_like(kept)))
    drawn = torch.searchsorted(reached, target, right=True).clamp(max=weights.shape[-1] - 1)
    return torch.where(kept > 0, ids.gather(-1, drawn), -1)[:, 0]
