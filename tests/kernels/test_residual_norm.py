"""residual_norm on a CPU, against its definition and transformers' norms, and what it refuses."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from chorus.kernels import Norm, RowPlan, SlotSegment, reference, residual_norm
from chorus.kernels.types import NormKind
from support.pointwise import EPS, check_norm, definition, make_norm
from support.rows import DTYPES, LAYOUTS, Layout, check_close, layouts, noise, segments_of, slot_of_rows

CPU = torch.device("cpu")
KINDS = get_args(NormKind)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS), layout=layouts, width=st.sampled_from([16, 33, 128]), dtype=st.sampled_from(DTYPES),
    with_x=st.booleans(), strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_residual_norm_is_its_definition_row_by_row(
    kind: NormKind, layout: Layout, width: int, dtype: torch.dtype, with_x: bool, strided: bool, seed: int
) -> None:
    if dtype is not torch.float32:
        layout = [*layout, (20, None)]  # an RMS of a few roundings means nothing
    check_norm(kind, layout, width, dtype, with_x=with_x, strided=strided, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_real_batches(kind: NormKind, layout: Layout) -> None:
    check_norm(kind, layout, 48, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_specification_is_exact_in_float64(kind: NormKind) -> None:
    layout = LAYOUTS["rows without an adapter around and between"]
    segments, rows = segments_of(layout)
    norm = make_norm(kind, 24, torch.float64, 0, pooled=True)
    h, x = noise(1, rows, 24).double(), noise(2, rows, 24).double()
    expected = definition(h + x, norm, slot_of_rows(layout))
    torch.testing.assert_close(reference.residual_norm(h, x, norm, segments), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_has_the_bits_of_transformers_llama(dtype: torch.dtype) -> None:
    """Of eighths, whose squares add up to the same in any order: vectors of another width add in another."""
    module = LlamaRMSNorm(64, EPS).to(dtype)
    nn.init.normal_(module.weight)
    h, x = (noise(seed, 9, 64).mul(8).round().div(8).to(dtype) for seed in range(2))
    expected = module(h + x)
    norm = Norm("rms", module.weight.detach(), EPS)
    assert torch.equal(reference.residual_norm(h.clone(), x, norm), expected)
    assert torch.equal(residual_norm(h.clone(), x, norm), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms_plus_one", "layer"])
def test_other_norms_equal_those_of_transformers_and_torch(kind: NormKind, dtype: torch.dtype) -> None:
    norm = make_norm(kind, 64, dtype, 3, pooled=False)
    h = noise(0, 9, 64).to(dtype)
    if kind == "layer":
        expected = nn.functional.layer_norm(h, (64,), norm.weight, norm.bias, EPS)
    else:
        module = Gemma3RMSNorm(64, EPS).to(dtype)
        module.weight.data.copy_(norm.weight)
        expected = module(h)
    for got in (residual_norm(h.clone(), None, norm), reference.residual_norm(h.clone(), None, norm)):
        check_close(got, expected.detach().double(), dtype)


def test_a_row_with_nan_reaches_no_other_row() -> None:
    norm = make_norm("rms", 16, torch.float32, 0, pooled=True)
    plan = RowPlan([SlotSegment(1, 3, 2)], 4, CPU)
    clean = residual_norm(noise(0, 4, 16), None, norm, plan)
    poisoned = noise(0, 4, 16)
    poisoned[1, 3] = float("nan")
    out = residual_norm(poisoned, None, norm, plan)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"residual": torch.zeros(3)}, "residual: want"),
        ({"residual": torch.zeros(4, 3).T}, "residual: rows must be contiguous"),
        ({"residual": torch.zeros(3, 4).double()}, "norm: made for torch.float32"),
        ({"residual": torch.zeros(3, 5)}, "norm: made for torch.float32 .T, 4."),
        ({"x": torch.zeros(3, 5)}, "x: want"),
        ({"x": torch.zeros(3, 4).half()}, "x: want"),
        ({"norm": Norm("rms", torch.ones(4), EPS)}, "norm: weights have 0 slots"),
        ({"plan": RowPlan([], 4, CPU)}, "plan: made for 4 rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_by_name(arguments: dict[str, Any], says: str) -> None:
    norm = Norm("rms", torch.ones(4), EPS, None, torch.ones(2, 4))
    given_: dict[str, Any] = {"residual": torch.zeros(3, 4), "x": None, "norm": norm}
    given_["plan"] = RowPlan([SlotSegment(0, 3, 1)], 3, CPU)
    with pytest.raises(ValueError, match=says):
        residual_norm(**(given_ | arguments))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("batch", torch.ones(4), EPS), "kind: 'batch'"),
        (("rms", torch.ones(4), EPS, torch.ones(4)), "bias: rms has none"),
        (("rms", torch.ones(()), EPS), "weight: want"),
        (("rms", torch.ones(8)[::2], EPS), "weight: want"),
        (("rms", torch.ones(4), EPS, None, torch.ones(2, 3)), "weights: want"),
        (("rms", torch.ones(4), EPS, None, torch.ones(2, 4).half()), "weights: want"),
        (("layer", torch.ones(4), EPS, torch.ones(4), torch.ones(2, 4)), "bias, biases"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_norm_that_makes_no_sense_is_refused_by_name(arguments: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Norm(*arguments)
