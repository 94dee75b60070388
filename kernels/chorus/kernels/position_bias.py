"""T5's relative position bias as a function of distance: what attention adds to the scores, far smaller than T x T."""

import math

import torch
from torch import Tensor


def relative_bias(table: Tensor, *, max_distance: int, bidirectional: bool) -> Tensor:
    """table [buckets, H], as T5 learns it -> bias [H, 2 * max_distance + 1] in float32.

    bias[h, max_distance + d] is what head h adds where the key stands d positions after the query; further away it is
    what it is at max_distance. Half of the buckets are single distances, the others grow with the logarithm up to
    max_distance; a bidirectional table has one half for keys before the query, one for keys after it.

    Raises:
        ValueError: the table has an odd number of buckets, or too few distances for them.
    """
    buckets = table.shape[0] // 2 if bidirectional else table.shape[0]
    if table.dim() != 2 or table.shape[0] % 4 or max_distance <= buckets // 2:
        raise ValueError(
            f"table: want [buckets, H], a multiple of 4 buckets, distances over {buckets // 2}; "
            f"got {tuple(table.shape)} and max_distance {max_distance}"
        )
    distance = torch.arange(-max_distance, max_distance + 1)
    back = distance.abs() if bidirectional else (-distance).clamp(min=0)
    exact = buckets // 2
    # float32, in the order of the model's own code: where a bucket begins depends on the last bit.
    grown = torch.log(back.float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    far = (exact + grown.clamp(min=0).long()).clamp(max=buckets - 1)
    bucket = torch.where(back < exact, back, far)
    if bidirectional:
        bucket += (distance > 0) * buckets
    return table.float().T.index_select(1, bucket.to(table.device)).contiguous()
