"""Launches the two kernels of `filtered_draw`, as one custom op that torch.compile and CUDA graphs take as it is.

No argument is checked here, and nothing waits for the device.
"""

import torch
from torch import Tensor

from chorus.kernels import triton_filtered_draw as kernels
from chorus.kernels.low_rank_launch import launch_options

GATHER_BLOCK, GATHER_WARPS = 4096, 16
"""Weights that a program which reads a whole row looks at together. Predicted: 8 a thread, so that 16 KB are under way
at a time; a row of 128,256 is 32 turns of 0.8 us from L2, two looks at it some 60 us. 16 a thread spill on sm100."""
DRAW_BLOCK, DRAW_WARPS = 1024, 4
"""The same over what was gathered. Predicted: a few hundred weights are one turn, whose sum over the threads is what a
look takes, 1 to 2 us; two questions of 27 looks some 80 us, all rows at a time."""

LARGEST = 0x3F800000
"""The bits of 1.0."""
START = 0x3B800000
"""The bits of 2^-8. A token below that share of the likeliest one's probability is seldom among those kept."""
STEP = 8 << 23
"""So much lower a bound is 2^-8 of it."""


@torch.library.custom_op("chorus::filtered_draw", mutates_args=())
def filtered_draw_op(weights: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, noise: Tensor) -> Tensor:
    """`reference.filtered_draw` of contiguous float32 weights between 0 and 1."""
    rows, vocabulary = weights.shape
    gathered = torch.empty_like(weights)
    ids = torch.empty(rows, vocabulary, dtype=torch.int32, device=weights.device)
    found = torch.empty(rows, 2, dtype=torch.int32, device=weights.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=weights.device)
    filters = {"totals_ptr": totals, "top_k_ptr": top_k, "top_p_ptr": top_p}
    between = {"gathered_ptr": gathered, "ids_ptr": ids, "found_ptr": found}
    with torch.cuda.device_of(weights):
        kernels.gather_likeliest[(rows,)](
            weights_ptr=weights,
            **filters,
            **between,
            V=vocabulary,
            START=START,
            STEP=STEP,
            BLOCK=GATHER_BLOCK,
            **launch_options(GATHER_WARPS, 1),
        )
        kernels.draw_likeliest[(rows,)](
            **between,
            **filters,
            noise_ptr=noise,
            out_ptr=tokens,
            V=vocabulary,
            LARGEST=LARGEST,
            BLOCK=DRAW_BLOCK,
            **launch_options(DRAW_WARPS, 1),
        )
    return tokens


@filtered_draw_op.register_fake
def _(weights: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, noise: Tensor) -> Tensor:
    return weights.new_empty(weights.shape[0], dtype=torch.int64)
