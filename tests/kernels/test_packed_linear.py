"""Packed linears: what they give is the product, whoever computes it, and nothing else is touched."""

import math

import pytest
import torch

from chorus.kernels import GatedActivation, PackedWeight, gated_mul, reference
from chorus.kernels.cpu_products import product_dtype
from chorus.kernels.native import packed_linear as native
from chorus.kernels.native.amx_tile import cpu_has_tiles
from support.rows import noise

# Rows of one tile, of several, of the kernel's most and of more; columns and depths that fill panels and that do not.
ROWS = (1, 7, 8, 9, 16, 17, 32, 63, 64, 65, 200)
SHAPES = ((64, 64), (40, 64), (200, 100), (1000, 66), (72, 1100), (128, 33), (8, 2))
# What only the compiled kernel promises. Where it never runs, these are said to be skipped.
of_onednn = pytest.mark.skipif(
    product_dtype(torch.bfloat16) != torch.bfloat16, reason="needs a CPU where oneDNN multiplies bfloat16"
)
of_the_kernel = pytest.mark.skipif(not native.runs(), reason="needs a CPU with AVX512_BF16")


def made(seed: int, *shape: int) -> torch.Tensor:
    return noise(seed, *shape).bfloat16()


def assert_close(got: torch.Tensor, exact: torch.Tensor) -> None:
    error = (got.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert float(error) <= 4e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_it_is_the_product(rows: int, shape: tuple[int, int]) -> None:
    (n, k), x = shape, made(0, rows, shape[1])
    weight, bias, residual = made(1, n, k), made(2, n), made(3, rows, n)
    packed, product = PackedWeight(weight), x.double() @ weight.double().T
    assert_close(packed.linear(x), product)
    assert_close(packed.linear(x, bias), product + bias.double())
    assert_close(packed.linear(x, residual=residual), product + residual.double())
    assert_close(packed.linear(x, bias, residual), product + bias.double() + residual.double())


def test_the_specification_is_the_product_rounded_once() -> None:
    x, weight, bias, residual = made(0, 5, 64), made(1, 48, 64), made(2, 48), made(3, 5, 48)
    exact = x.double() @ weight.double().T + bias.double() + residual.double()
    off = (reference.linear(x, weight, bias, residual).double() - exact).abs()
    assert bool((off <= exact.abs() * 2.0**-8 + 1e-5).all())


def test_the_weight_can_be_had_back_bit_for_bit() -> None:
    for n, k in SHAPES:
        weight = made(1, n, k)
        assert torch.equal(PackedWeight(weight).dense(), weight)


@pytest.mark.parametrize("rows", [5, 80])
def test_x_and_residual_may_be_of_any_rank_and_lie_apart(rows: int) -> None:
    weight = made(1, 72, 64)
    packed = PackedWeight(weight)
    wide, residual = made(0, 2, rows, 100), made(2, 2, rows, 200)
    x, summand = wide[..., 10:74], residual[..., 5:77]
    got = packed.linear(x, residual=summand)
    assert got.shape == (2, rows, 72)
    assert_close(got, x.double() @ weight.double().T + summand.double())
    across = made(3, 64, rows)
    assert_close(packed.linear(across.T), across.T.double() @ weight.double().T)


def test_no_rows_give_no_rows() -> None:
    packed, none = PackedWeight(made(1, 72, 64)), made(0, 0, 64)
    assert packed.linear(none).shape == (0, 72)
    assert packed.gated(none, None, "silu").shape == (0, 36)


# Halves of whole panels, of one and of several; halves that no panel ends with.
@pytest.mark.parametrize("shape", [(128, 64), (384, 1100), (256, 33), (200, 64)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_gate_has_the_bits_of_its_linear_and_its_product(
    shape: tuple[int, int], activation: GatedActivation, with_bias: bool
) -> None:
    (n, k), packed = shape, PackedWeight(made(1, *shape))
    bias = made(2, n) if with_bias else None
    for rows in (1, 9, 16, 40, 64, 65):
        x = made(0, rows, k)
        gate, up = packed.linear(x, bias).chunk(2, dim=1)
        assert torch.equal(packed.gated(x, bias, activation), gated_mul(gate, up, activation))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gates_columns_are_the_first_and_ups_the_last(activation: GatedActivation) -> None:
    weight, x = made(1, 256, 64), made(0, 16, 64)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    assert_close(PackedWeight(weight).gated(x, None, activation), reference.gated_mul(gate, up, activation))


def test_a_gate_of_strided_rows_and_of_a_nan() -> None:
    packed, wide = PackedWeight(made(1, 256, 64)), made(0, 16, 100)
    clean = packed.gated(wide[:, 10:74], None, "silu")
    assert torch.equal(clean, packed.gated(wide[:, 10:74].contiguous(), None, "silu"))
    wide[3, 20] = math.nan
    got = packed.gated(wide[:, 10:74], None, "silu")
    assert got[3].isnan().all()
    others = [row for row in range(16) if row != 3]
    assert torch.equal(got[others], clean[others])


def test_a_rows_nan_and_infinity_stay_in_it() -> None:
    weight, x = made(1, 72, 64), made(0, 16, 64)
    clean = PackedWeight(weight).linear(x)
    x[3, 5], x[9, 0] = math.nan, math.inf
    got = PackedWeight(weight).linear(x)
    assert not torch.isfinite(got[[3, 9]]).any()
    others = [row for row in range(16) if row not in (3, 9)]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("rows", [4, 80])
def test_what_does_not_fit_is_refused(rows: int) -> None:
    packed, x = PackedWeight(made(1, 72, 64)), made(0, rows, 64)
    for wrong in (made(0, rows, 62), x.float()):
        with pytest.raises(ValueError, match="x, bias, residual"):
            packed.linear(wrong)
    with pytest.raises(ValueError, match="x, bias, residual"):
        packed.linear(x, made(0, 71))
    with pytest.raises(ValueError, match="x, bias, residual"):
        packed.linear(x, residual=made(0, rows - 1, 72))
    with pytest.raises(ValueError, match="x, bias, residual"):
        packed.linear(x, residual=made(0, rows, 72).half())
    with pytest.raises(ValueError, match="x, bias, residual"):
        packed.gated(made(0, rows, 62), None, "silu")
    with pytest.raises(ValueError, match=r"want \[T, 64\]"):
        packed.gated(x[None], None, "silu")
    with pytest.raises(ValueError, match="two halves"):
        PackedWeight(made(1, 7, 64)).gated(x, None, "silu")


@of_onednn
def test_the_kernel_reads_what_onednn_packs_wherever_it_runs() -> None:
    for n, k in SHAPES:
        weight = made(1, n, k)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        readable = native.address_of(packed, weight) is not None
        of_its_own = k == 2 and cpu_has_tiles()  # with AMX oneDNN pads so few of them otherwise
        assert readable == (native.runs() and k % 2 == 0 and not of_its_own)


@of_onednn
def test_a_layout_that_is_not_the_kernels_is_left_to_onednn() -> None:
    weight = made(1, 200, 64)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    for row in (0, 199):
        other = weight.clone()
        other[row, 63] += 1
        assert native.address_of(packed, other) is None


@of_the_kernel
def test_threads_change_no_bit() -> None:
    weight, x = made(1, 1000, 66), made(0, 40, 66)
    packed, threads = PackedWeight(weight), torch.get_num_threads()
    try:
        outcomes = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes += [packed.linear(x) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


@of_the_kernel
def test_a_row_comes_out_alike_in_any_batch() -> None:
    packed, x = PackedWeight(made(1, 200, 1030)), made(0, 64, 1030)
    together = packed.linear(x)
    for rows in (1, 9, 31):
        assert torch.equal(packed.linear(x[-rows:]), together[-rows:])


@of_the_kernel
def test_nothing_beside_y_is_written() -> None:
    weight, x = made(1, 72, 64), made(0, 5, 64)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    at = native.address_of(packed, weight)
    assert at is not None
    memory = torch.full((9, 100), 7.0).bfloat16()
    native.packed_linear(memory[2:7, 11:83], x, at, None, None)
    assert_close(memory[2:7, 11:83], x.double() @ weight.double().T)
    memory[2:7, 11:83] = 7
    assert bool((memory == 7).all())
