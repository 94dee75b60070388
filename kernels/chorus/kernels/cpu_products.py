"""In which dtype torch is best asked for products of matrices on this CPU."""

from functools import cache

import torch


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but float32 for bfloat16 where oneDNN refuses it, as it does on AVX2 alone.

    torch has loops of its own then, which take 6 times as long as float32 (512 rows of 1024 x 1024, AVX2, 2 cores).
    """
    if dtype == torch.bfloat16 and not (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return torch.float32
    return dtype
