"""row_scale, row_add and row_select on Triton, in the interpreter, against their definition."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.kernels import RowPlan, SlotSegment, row_scale
from support.row_ops import DEFINITIONS, check
from support.rows import DTYPES, Layout, layouts, segments_of

CPU = torch.device("cpu")


@settings(max_examples=25, deadline=None)
@given(
    operator=st.sampled_from(list(DEFINITIONS)), layout=layouts, width=st.sampled_from([1, 33, 1040]),
    dtype=st.sampled_from(DTYPES), in_float32=st.booleans(), strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_row_operators_are_their_definition_row_by_row(
    operator: Callable[..., torch.Tensor], layout: Layout, width: int, dtype: torch.dtype,
    in_float32: bool, strided: bool, seed: int,
) -> None:  # fmt: skip
    width = width if dtype is torch.float32 or width > 1 else 33  # an RMS of a few roundings means nothing
    pool = torch.float32 if in_float32 else dtype
    check(operator, layout, width, dtype, pool, strided=strided, seed=seed, triton=True)


@pytest.mark.parametrize("operator", DEFINITIONS, ids=lambda o: o.__name__)
def test_a_capacity_holds_any_batch_in_the_same_buffer(operator: Callable[..., torch.Tensor]) -> None:
    """The largest first and last: nothing is left out, whatever the table held before."""
    full: Layout = [(1, i % 6) for i in range(7)]
    plan = RowPlan([], 0, CPU, triton=True, capacity=7)
    buffer = plan.buffer
    batches: list[Layout] = [full, [(2, None), (3, 1)], [(1, None)], full]
    for layout in batches:
        plan.rewrite(*segments_of(layout))
        assert plan.buffer is buffer
        check(operator, layout, 33, torch.float32, torch.float32, plan=plan)
    with pytest.raises(ValueError, match="rows: 8, the capacity is 7"):
        plan.rewrite([], 8)


def test_the_op_is_what_torch_expects_of_ops() -> None:
    from chorus.kernels.row_launch import update_rows_op

    plan = RowPlan([SlotSegment(0, 2, 1)], 3, CPU, triton=True)
    assert plan.buffer is not None
    for does in ("scale", "add", "select"):
        arguments = (torch.randn(3, 20)[:, 2:18], torch.randn(2, 16), plan.buffer, plan.entries, does)
        torch.library.opcheck(update_rows_op, arguments)


def test_float64_runs_on_the_specification() -> None:
    plan = RowPlan([SlotSegment(0, 1, 0)], 2, CPU, triton=True)
    out = row_scale(torch.ones(2, 3).double(), torch.full((1, 3), 1 / 3).double(), plan)
    assert torch.equal(out[0], torch.full((3,), 1 / 3).double())
