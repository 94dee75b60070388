"""top_k and top_p: which tokens of a row may be drawn, found among its likeliest few where these are enough.

    weights, likeliest first   1.0  0.6  0.3  0.1 | 0.05  0.01 ...      `width` of V are ranked
    top_k 3                    kept kept kept
    top_p 0.7 of what is kept  kept kept

Knows weights and filters, neither sequences nor noise.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from chorus.engine.ranking import top


class Kept(NamedTuple):
    """The `width` likeliest tokens of each row, likeliest first: weights [R, width], 0 where filtered, and ids.

    `complete` [R] says of which rows nothing is missing: all that their filters keep is among them.
    """

    weights: Tensor
    ids: Tensor
    complete: Tensor


def keep(weights: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> Kept:
    """Filters rows of float32 weights [R, V], which need not add up to 1.

    `top_k` [R], where 0 and V and more keep all, then `top_p` [R] in (0, 1] of what that leaves: the shortest run of
    likeliest tokens with that share. The likeliest always stays. Of equal weights the smaller id goes first.
    """
    vocabulary = weights.shape[-1]
    ids = top(weights, width, above=0.0)
    ranked = weights.gather(-1, ids).double()
    limit = torch.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary)[:, None]
    ranked = ranked.masked_fill(torch.arange(width, device=weights.device) >= limit, 0)
    reached = ranked.cumsum(dim=-1)
    unlimited = limit == vocabulary
    wanted = torch.where(unlimited, weights.sum(dim=-1, keepdim=True), reached[:, -1:]) * top_p[:, None]
    complete = (limit <= width) | (unlimited & (reached[:, -1:] >= wanted))
    # What stands before a token decides, so the likeliest, before which nothing stands, stays.
    ranked = ranked.masked_fill((reached - ranked >= wanted) & (top_p < 1)[:, None], 0)
    return Kept(ranked, ids, complete[:, 0])
