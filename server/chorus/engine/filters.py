"""top_k and top_p: a token of each row among those that may be drawn.

On a CPU a look at what was computed costs nothing. So the kept ones are sought among a row's likeliest few, and among
more of those rows whose filters keep more:

    weights, likeliest first   1.0  0.6  0.3  0.1 | 0.05  0.01 ...      `width` of V are ranked
    top_k 3                    kept kept kept
    top_p 0.7 of what is kept  kept kept

Elsewhere `chorus.kernels.filtered_draw` draws them, which the host need not look at. Both give the same tokens. Knows
weights and filters, neither sequences nor where noise comes from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from chorus.engine.inversion import invert
from chorus.engine.ranking import top
from chorus.kernels import filtered_draw

# So many tokens of a row are ranked, then more, then all, until none is missing that may be drawn. For 32 rows of
# 151,936 on 2 cores that takes 3 ms, 11 ms and 220 ms; 256 would take 5 ms, and 0.6 ms instead of 0.1 for 16 of 8,192.
WIDTHS = (64, 1024)
# Fewer than all, if all are at least so many times as many: else a sort of them all takes no longer.
WORTHWHILE = 8


def draw_kept(weights: Tensor, top_k: Tensor, top_p: Tensor, noise: Tensor) -> Tensor:
    """Token ids [R] of float32 weights [R, V], the likeliest of each row 1; -1 where a row has none, or NaN.

    `top_k` [R], where 0 and V and more keep all, then `top_p` [R] in (0, 1] of what that leaves: the shortest run of
    likeliest tokens with that share. The likeliest always stays. Of equal weights the smaller id goes first. `noise`
    [R] in [0, 1) says which of them is drawn, likeliest first.
    """
    totals = weights.sum(dim=-1)
    if weights.device.type != "cpu":
        return filtered_draw(weights, totals, top_k, top_p, noise)
    tokens = torch.full_like(top_k, -1)
    rows = torch.arange(len(tokens))
    vocabulary = weights.shape[-1]
    for width in (*(width for width in WIDTHS if width <= vocabulary // WORTHWHILE), vocabulary):
        kept = keep(weights, totals, top_k, top_p, width)
        place = invert(kept.weights, noise)
        tokens[rows] = torch.where(place >= 0, kept.ids.gather(-1, place.clamp(min=0)[:, None])[:, 0], -1)
        rest = (~kept.complete).nonzero()[:, 0]
        if not len(rest):
            break
        rows, weights, totals, top_k, top_p, noise = (t[rest] for t in (rows, weights, totals, top_k, top_p, noise))
    return tokens


class Kept(NamedTuple):
    """The `width` likeliest tokens of each row, likeliest first: weights [R, width], 0 where filtered, and ids.

    `complete` [R] says of which rows nothing is missing: all that their filters keep is among them.
    """

    weights: Tensor
    ids: Tensor
    complete: Tensor


def keep(weights: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> Kept:
    """Filters rows of weights [R, V], whose sums are `totals` [R]."""
    vocabulary = weights.shape[-1]
    ids = top(weights, width, above=0.0)
    ranked = weights.gather(-1, ids).double()
    limit = torch.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary)[:, None]
    ranked = ranked.masked_fill(torch.arange(width, device=weights.device) >= limit, 0)
    reached = ranked.cumsum(dim=-1)
    unlimited = limit == vocabulary
    wanted = torch.where(unlimited, totals[:, None], reached[:, -1:]) * top_p[:, None]
    complete = (limit <= width) | (unlimited & (reached[:, -1:] >= wanted))
    # What stands before a token decides, so the likeliest, before which nothing stands, stays.
    ranked = ranked.masked_fill((reached - ranked >= wanted) & (top_p < 1)[:, None], 0)
    return Kept(ranked, ids, complete[:, 0])
