"""Linears where the CPU does not multiply bfloat16: the product of the same numbers, in any batch, on any threads."""

import math

import pytest
import torch

from chorus.kernels import PackedWeight, packed_linear, reference
from chorus.kernels.native.widened_linear import MOST_ROWS, packed, unpacked, widened_linear
from support.rows import noise

# Tiles of 1 to 6 rows, several of them, one block of rows and more than one.
ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 16, MOST_ROWS, MOST_ROWS + 1, 200)
SHAPES = ((64, 64), (40, 64), (200, 100), (1000, 66), (72, 1024), (128, 33), (8, 2), (1, 1), (65, 129))


def made(seed: int, *shape: int) -> torch.Tensor:
    return noise(seed, *shape).bfloat16()


def multiplied(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = torch.full((len(x), len(weight)), math.nan, dtype=torch.bfloat16)
    widened_linear(y, x, packed(weight), None, None)
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_it_is_the_product_rounded_once(rows: int, shape: tuple[int, int]) -> None:
    """To the bit but where a sum in another order is rounded the other way: half a unit and what float32 loses."""
    (n, k), x = shape, made(0, rows, shape[1])
    weight, bias, residual = made(1, n, k), made(2, n), made(3, rows, n)
    exact = x.double() @ weight.double().T + bias.double() + residual.double()
    y = torch.full((rows, n), math.nan, dtype=torch.bfloat16)
    widened_linear(y, x, packed(weight), bias, residual)
    lost = (x.double().abs() @ weight.double().abs().T) * k * 2.0**-24
    assert bool(((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + lost + 1e-6).all())
    if y.numel() >= 500:
        assert float((y != reference.linear(x, weight, bias, residual)).double().mean()) <= 0.02


@pytest.mark.parametrize("rows", [5, 80])
def test_a_packed_weight_is_of_this_layout_where_onednn_has_no_bfloat16(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(packed_linear, "product_dtype", lambda dtype: torch.float32)
    weight, wide, residual, bias = made(1, 72, 64), made(0, 2, rows, 100), made(2, 2, rows, 200), made(3, 72)
    linear, x, summand = PackedWeight(weight), wide[..., 10:74], residual[..., 5:77]
    expected = reference.linear(x, weight, bias, summand)
    torch.testing.assert_close(linear.linear(x, bias, summand), expected, rtol=2.0**-7, atol=1e-4)
    assert torch.equal(linear.linear(x.flatten(0, 1)), multiplied(x.flatten(0, 1), weight))
    assert torch.equal(linear.dense(), weight)
    assert linear.linear(x[:, :0]).shape == (2, 0, 72)


def test_the_weight_can_be_had_back_bit_for_bit() -> None:
    for n, k in SHAPES:
        weight = made(1, n + 1, k)[1:]  # behind any number of others
        laid = packed(weight)
        again = unpacked(laid, n, k)
        assert torch.equal(again, weight)
        again.zero_()
        assert torch.equal(unpacked(laid, n, k), weight)


def test_a_product_over_nothing_is_what_is_added() -> None:
    bias, residual = made(2, 72), made(3, 5, 72)
    y = torch.empty(5, 72, dtype=torch.bfloat16)
    widened_linear(y, made(0, 5, 0), packed(made(1, 72, 0)), bias, residual)
    assert torch.equal(y, reference.linear(made(0, 5, 0), made(1, 72, 0), bias, residual))


def test_a_row_comes_out_alike_in_any_batch() -> None:
    weight, x = made(1, 200, 1031), made(0, 100, 1031)
    together = multiplied(x, weight)
    for rows in (1, 2, 3, 4, 5, 6, 9, 31, 49):
        assert torch.equal(multiplied(x[-rows:], weight), together[-rows:])


def test_threads_change_no_bit() -> None:
    weight, x, threads = made(1, 1000, 66), made(0, 130, 66), torch.get_num_threads()
    try:
        outcomes = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes += [multiplied(x, weight) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


def test_a_rows_nan_and_infinity_stay_in_it() -> None:
    weight, x = made(1, 72, 65), made(0, 16, 65)
    clean = multiplied(x, weight)
    x[3, 64], x[9, 0] = math.nan, math.inf
    got = multiplied(x, weight)
    assert not torch.isfinite(got[[3, 9]]).any()
    others = [row for row in range(16) if row not in (3, 9)]
    assert torch.equal(got[others], clean[others])


def test_nothing_beside_y_is_written() -> None:
    weight, x = made(1, 72, 64), made(0, 53, 64)
    memory = torch.full((57, 100), 7.0).bfloat16()
    widened_linear(memory[2:55, 11:83], x, packed(weight), None, None)
    assert torch.equal(memory[2:55, 11:83], multiplied(x, weight))
    memory[2:55, 11:83] = 7
    assert bool((memory == 7).all())
