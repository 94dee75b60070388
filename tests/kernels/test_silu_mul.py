"""silu_mul and gelu_tanh_mul on a CPU, against float64 math and transformers' feed-forwards; what they refuse."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from chorus.kernels import gelu_tanh_mul, reference, silu_mul
from support.gated import DEFINITIONS, check
from support.rows import DTYPES, noise

Operator = Callable[..., torch.Tensor]


@settings(max_examples=40, deadline=None)
@given(
    operator=st.sampled_from(list(DEFINITIONS)), rows=st.integers(0, 20), width=st.sampled_from([17, 64, 200]),
    dtype=st.sampled_from(DTYPES), fused=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_gated_products_are_their_definition(
    operator: Operator, rows: int, width: int, dtype: torch.dtype, fused: bool, seed: int
) -> None:
    check(operator, rows, width, dtype, fused=fused, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("operator", "activation", "name"), [(silu_mul, "silu", "silu"), (gelu_tanh_mul, "gelu_tanh", "gelu_pytorch_tanh")]
)
def test_they_have_the_bits_of_transformers(
    operator: Operator, activation: reference.GatedActivation, name: str, dtype: torch.dtype
) -> None:
    gate, up = noise(0, 5, 48).to(dtype), noise(1, 5, 48).to(dtype)
    expected = ACT2FN[name](gate) * up
    assert torch.equal(operator(gate, up), expected)
    assert torch.equal(reference.gated_mul(gate, up, activation), expected)


@pytest.mark.parametrize("operator", DEFINITIONS, ids=lambda o: o.__name__)
def test_what_does_not_fit_is_refused_by_name(operator: Operator) -> None:
    good = torch.zeros(2, 4)
    for gate, up in (
        (good, torch.zeros(2, 5)),
        (good, good.half()),
        (torch.zeros(4), torch.zeros(4)),
        (good, good.to("meta")),
    ):
        with pytest.raises(ValueError, match="gate, up: want one shape"):
            operator(gate, up)
    for name, pair in (("gate", (torch.zeros(4, 2).T, good)), ("up", (good, torch.zeros(1, 4).expand(2, 4)))):
        with pytest.raises(ValueError, match=f"{name}: rows must be contiguous"):
            operator(*pair, triton=True)
