"""residual_norm on Triton, in the interpreter, against its definition."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from chorus.kernels import Norm, RowPlan, SlotSegment, residual_norm
from chorus.kernels.types import NormKind
from support.launches import noted_launches
from support.pointwise import EPS, check_norm, make_norm
from support.rows import DTYPES, Layout, layouts, noise, segments_of

CPU = torch.device("cpu")
KINDS = get_args(NormKind)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS), layout=layouts, width=st.sampled_from([16, 33, 1040]), dtype=st.sampled_from(DTYPES),
    with_x=st.booleans(), strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_residual_norm_is_its_definition_row_by_row(
    kind: NormKind, layout: Layout, width: int, dtype: torch.dtype, with_x: bool, strided: bool, seed: int
) -> None:
    if dtype is not torch.float32:
        layout = [*layout, (20, None)]  # an RMS of a few roundings means nothing
    check_norm(kind, layout, width, dtype, with_x=with_x, strided=strided, seed=seed, triton=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_rounds_where_transformers_llama_does(dtype: torch.dtype) -> None:
    """Sums differ in order, so that a few values lie on the other side of a rounding; a wrong order moves a third."""
    module = LlamaRMSNorm(256, EPS).to(dtype)
    torch.nn.init.normal_(module.weight)
    h, x = noise(0, 40, 256).to(dtype), noise(1, 40, 256).to(dtype)
    got = residual_norm(h.clone(), x, Norm("rms", module.weight.detach(), EPS), triton=True)
    assert float((got != module(h + x)).float().mean()) < 0.01


def test_a_capacity_holds_any_batch_in_the_same_buffer() -> None:
    plan = RowPlan([], 0, CPU, triton=True, capacity=7)
    full: Layout = [(1, i % 6) for i in range(7)]
    batches: list[Layout] = [full, [(2, None), (3, 1)], [(1, None)], full]
    for layout in batches:
        plan.rewrite(*segments_of(layout))
        check_norm("layer", layout, 33, torch.float32, plan=plan)


def test_the_op_is_what_torch_expects_of_ops() -> None:
    from chorus.kernels.pointwise_launch import residual_norm_op

    plan = RowPlan([SlotSegment(0, 2, 1)], 3, CPU, triton=True)
    norm = make_norm("layer", 16, torch.float32, 0, pooled=True)
    vectors = (norm.weight, norm.bias, norm.weights, norm.biases)
    for x, pool in ((torch.randn(3, 16), (plan.buffer, 2 * plan.entries)), (None, (None, 0))):
        given_ = vectors if x is not None else (*vectors[:2], None, None)
        torch.library.opcheck(residual_norm_op, (torch.randn(3, 16), x, *given_, *pool, "layer", EPS))


@pytest.mark.parametrize(("width", "widest"), [(16400, 16384), (8193, 8192)])
def test_rows_wider_than_the_kernel_takes_are_refused(width: int, widest: int) -> None:
    with pytest.raises(ValueError, match=f"residual: rows of {width}, the kernel takes up to {widest}"):
        residual_norm(torch.zeros(1, width), None, Norm("rms", torch.ones(width), EPS), triton=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_rows_nothing_is_launched(dtype: torch.dtype) -> None:
    norm, none = Norm("rms", torch.ones(16, dtype=dtype), EPS), torch.zeros(0, 16, dtype=dtype)
    with noted_launches() as launches:
        out = residual_norm(none, none, norm, triton=True)
        residual_norm(torch.zeros(1, 16, dtype=dtype), None, norm, triton=True)
    assert out.shape == (0, 16)
    assert [(name, grid) for name, grid, _ in launches] == [("residual_norm", (1,))]


def test_float64_runs_on_the_specification() -> None:
    norm = make_norm("rms", 8, torch.float64, 0, pooled=False)
    out = residual_norm(noise(0, 2, 8).double(), None, norm, triton=True)
    expected = residual_norm(noise(0, 2, 8).double(), None, norm, triton=False)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
