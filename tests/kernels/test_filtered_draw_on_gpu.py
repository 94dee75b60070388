"""filtered_draw on a CUDA device: the specification's tokens, the same in any batch, and nobody waits for them."""

import pytest
import torch

from chorus.kernels import filtered_draw
from support.filtered_draw import many

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocabulary", [1, 1500, 32_000, 128_256])
def test_rows_of_any_sharpness_draw_what_the_specification_draws(vocabulary: int) -> None:
    there = many(vocabulary, seed=vocabulary, device="cuda")
    tokens = filtered_draw(*there)
    assert torch.equal(tokens, filtered_draw(*there, triton=False))
    assert torch.equal(tokens, torch.cat([filtered_draw(*(t[i : i + 1] for t in there)) for i in range(24)]))


def test_nobody_waits_for_a_draw() -> None:
    there = many(32_000, seed=1, device="cuda")
    filtered_draw(*there)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        filtered_draw(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
