"""Attention on a CPU over keys that lie together: SDPA where it has what is asked for, else in pieces of queries."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Values of a mask or of scores that are held at once: 64 MB in float32.
PIECE = 1 << 24


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    seen: Tensor | None = None,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """query [B, H, n, D], key and value [B, H, L, D] -> [B, H, n, D].

    `seen` is a bool mask that broadcasts to [B, 1, n, L], True where a query sees a key. `bias` is by distance, as of
    `relative_bias`; the first query stands at position `first` of the keys.
    """
    if bias is None and soft_cap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
    (batch, heads, count, _), length = query.shape, key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    step = max(PIECE // (batch * heads * length), 1)
    pieces = []
    for at in range(0, count, step):
        part = query[:, :, at : at + step]
        rows = part.shape[2]
        added = torch.zeros(1, 1, rows, length, dtype=wide)
        if bias is not None:
            added = _by_distance(bias.to(wide), first + at, rows, length)
        if seen is not None:
            added = added.masked_fill(~(seen[:, :, at : at + rows] if seen.shape[2] > 1 else seen), float("-inf"))
        pieces.append(_attend(part, key, value, added, scale, soft_cap))
    return torch.cat(pieces, dim=2)


def _by_distance(bias: Tensor, first: int, rows: int, length: int) -> Tensor:
    """[1, H, rows, L] of queries from position `first` on."""
    furthest = bias.shape[1] // 2
    distance = torch.arange(length) - torch.arange(first, first + rows)[:, None]
    index = distance.clamp_(-furthest, furthest).add_(furthest)
    return bias.index_select(1, index.flatten()).view(1, -1, rows, length)


def _attend(query: Tensor, key: Tensor, value: Tensor, added: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """`added` to the scores, which a soft cap needs in float32, as no kernel of torch's has it."""
    if soft_cap is None:
        mask = added.expand(query.shape[0], query.shape[1], -1, -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = query.to(added.dtype) @ key.to(added.dtype).transpose(2, 3)
    scores.mul_(scale / soft_cap).tanh_().mul_(soft_cap).add_(added)
    return (torch.softmax(scores, dim=-1) @ value.to(added.dtype)).to(query.dtype)
