"""The innermost loop of linears: the product, wherever the CPU fetches what comes next."""

import numba
import numpy as np
import pytest
import torch

from chorus.kernels.native import dot_tile
from chorus.kernels.native.numbers import OPTIONS
from chorus.kernels.native.packed_linear import runs

K, LAST = 96, 5


@pytest.mark.skipif(not runs(), reason="needs a CPU with AVX512_BF16")
@pytest.mark.parametrize("past_the_caches", [False, True])
def test_it_is_the_product_of_six_rows_and_the_last_one_again(
    past_the_caches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two is not what this CPU's code is made of."""
    monkeypatch.setattr(dot_tile, "_PAST_THE_CACHES", past_the_caches)
    tile = dot_tile.tile

    @numba.njit(**OPTIONS)
    def multiply(x_at, w_at, sums_at):  # type: ignore[no-untyped-def]
        tile(x_at, 2 * K, LAST, w_at, K // 2, sums_at, w_at, 128)

    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, K, generator=generator).bfloat16() for n in (LAST + 1, dot_tile.PANEL))
    panel = aligned(4 * dot_tile.PANEL * K // 2)
    panel[:] = w.view(-1, K // 2, 2).transpose(0, 1).contiguous().view(torch.uint8).flatten().numpy()
    sums = aligned(4 * dot_tile.PANEL * dot_tile.ROWS).view(np.float32).reshape(dot_tile.ROWS, dot_tile.PANEL)
    sums[:] = 1
    multiply(x.data_ptr(), panel.ctypes.data, sums.ctypes.data)
    exact = 1 + (x.double() @ w.double().T).numpy()
    rows, columns = [0, 1, 2, 3, 4, 5, LAST, LAST], dot_tile.COLUMNS
    assert np.allclose(sums[:, :columns], exact[rows, :columns], rtol=1e-5, atol=1e-4)
    assert (sums[:, columns:] == 1).all()


def aligned(size: int) -> np.ndarray:
    """Bytes from an address on that 64 divides."""
    memory = np.zeros(size + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size]
