"""`likeliest`: each row's greedy token, and whether its logits are numbers that one can be taken from."""

import torch
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.dispatch import runs_native
from chorus.kernels.row_ops import check_strides


def likeliest(logits: Tensor) -> Tensor:
    """Ids [S], int64, of logits [S, V]; -1 where a row's largest is not finite, or it has NaN. See `reference`.

    Raises:
        ValueError: logits are not rows of floating point of at least one number, or, for a kernel, not contiguous ones.
    """
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(f"logits: want floating point [S, V], V > 0, got {logits.dtype} {tuple(logits.shape)}")
    if not runs_native(logits):
        return reference.likeliest(logits)
    from chorus.kernels.native import likeliest as native  # numba is not everywhere

    check_strides("logits", logits)
    tokens = torch.empty(len(logits), dtype=torch.int64)
    native.likeliest(tokens, logits)
    return tokens
