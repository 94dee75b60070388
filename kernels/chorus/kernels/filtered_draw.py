"""`filtered_draw`: a token of each row of weights, among those that top_k and top_p keep.

How much of a row the filters keep is known on the device alone. So that nobody has to wait for it, on CUDA one kernel
gathers what may be kept and another one draws, each with as many turns as its row takes: the host launches both,
whatever the rows hold. No row is sorted.
"""

import torch
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.dispatch import runs_triton


def filtered_draw(
    weights: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, noise: Tensor, *, triton: bool | None = None
) -> Tensor:
    """Token ids [R], int64, of weights [R, V]; see `reference.filtered_draw`. -1 where a row has no mass, or NaN.

    Weights are float32 and none is over 1, what the likeliest has. `triton` says whether Triton runs (on CUDA if None).

    Raises:
        ValueError: weights are not rows of float32 that lie together, or a vector does not fit them.
    """
    if weights.dim() != 2 or weights.dtype != torch.float32 or not weights.is_contiguous():
        raise ValueError(f"weights: want float32 [R, V], contiguous, got {weights.dtype} {tuple(weights.shape)}")
    for name, vector, dtype in (
        ("totals", totals, torch.float32),
        ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float64),
        ("noise", noise, torch.float64),
    ):
        if vector.shape != weights.shape[:1] or vector.dtype != dtype or vector.device != weights.device:
            raise ValueError(
                f"{name}: want {dtype} [{weights.shape[0]}] on {weights.device}, "
                f"got {vector.dtype} {tuple(vector.shape)} on {vector.device}"
            )
    if not runs_triton(weights.device, triton):
        return reference.filtered_draw(weights, totals, top_k, top_p, noise)
    from chorus.kernels.filtered_draw_launch import filtered_draw_op  # Triton is not everywhere

    tokens: Tensor = filtered_draw_op(weights, totals, top_k, top_p, noise)
    return tokens
