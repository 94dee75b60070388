"""The check of silu_mul and gelu_tanh_mul against float64 math."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from chorus.kernels import gelu_tanh_mul, silu_mul
from support.rows import check_close, noise, poisoned_memory

DEFINITIONS: dict[Callable[..., Tensor], Callable[[Tensor], Tensor]] = {
    silu_mul: lambda g: g / (1 + torch.exp(-g)),
    gelu_tanh_mul: lambda g: 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
}


def check(
    operator: Callable[..., Tensor], rows: int, width: int, dtype: torch.dtype, *, fused: bool, seed: int = 0,
    device: str = "cpu", triton: bool | None = None,
) -> None:  # fmt: skip
    """gate and up apart, or as halves of one tensor; large gates too; nothing unwritten, the same bits again."""
    both = (noise(seed, rows, 2 * width) * 4).to(dtype)
    gate, up = both.to(device).chunk(2, dim=-1) if fused else (h.contiguous().to(device) for h in both.chunk(2, -1))
    with poisoned_memory():
        got, again = (operator(gate, up, triton=triton) for _ in range(2))
    wide_gate, wide_up = both.double().chunk(2, dim=-1)
    check_close(got, DEFINITIONS[operator](wide_gate) * wide_up, dtype)
    assert torch.equal(got, again)
    assert got.is_contiguous()
    assert torch.equal(torch.cat((gate, up), dim=-1).cpu(), both)
