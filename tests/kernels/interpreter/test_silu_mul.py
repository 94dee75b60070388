"""silu_mul and gelu_tanh_mul on Triton, in the interpreter, against float64 math."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.kernels import reference, silu_mul
from chorus.kernels.pointwise_launch import gated_mul_op
from support.gated import DEFINITIONS, check
from support.rows import DTYPES


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # 1 / (1 + inf) is meant
@settings(max_examples=20, deadline=None)
@given(
    operator=st.sampled_from(list(DEFINITIONS)), rows=st.integers(1, 4), width=st.sampled_from([17, 64, 1040]),
    dtype=st.sampled_from(DTYPES), fused=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_gated_products_are_their_definition(
    operator: Callable[..., torch.Tensor], rows: int, width: int, dtype: torch.dtype, fused: bool, seed: int
) -> None:
    check(operator, rows, width, dtype, fused=fused, seed=seed, triton=True)


def test_the_op_is_what_torch_expects_of_ops() -> None:
    gate, up = torch.randn(3, 40).chunk(2, dim=-1)
    torch.library.opcheck(gated_mul_op, (gate, up, "silu"))


def test_float64_runs_on_the_specification() -> None:
    gate, up = torch.randn(3, 40).double().chunk(2, dim=-1)
    assert torch.equal(silu_mul(gate, up, triton=True), reference.gated_mul(gate, up, "silu"))
