"""row_scale, row_add and row_select on a CPU, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.kernels import RowPlan, SlotSegment, reference, row_add, row_scale, row_select
from support.row_ops import DEFINITIONS, check
from support.rows import DTYPES, LAYOUTS, Layout, layouts, noise, segments_of, slot_of_rows

CPU = torch.device("cpu")
Operator = Callable[..., torch.Tensor]


@settings(max_examples=60, deadline=None)
@given(
    operator=st.sampled_from(list(DEFINITIONS)), layout=layouts, width=st.sampled_from([1, 7, 64]),
    dtype=st.sampled_from(DTYPES), in_float32=st.booleans(), strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_row_operators_are_their_definition_row_by_row(
    operator: Operator, layout: Layout, width: int, dtype: torch.dtype, in_float32: bool,
    strided: bool, seed: int,
) -> None:  # fmt: skip
    width = width if dtype is torch.float32 else 64  # an RMS of a few roundings means nothing
    check(operator, layout, width, dtype, torch.float32 if in_float32 else dtype, strided=strided, seed=seed)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("operator", DEFINITIONS, ids=lambda o: o.__name__)
def test_layouts_of_real_batches(operator: Operator, layout: Layout) -> None:
    check(operator, layout, 48, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("operator", DEFINITIONS, ids=lambda o: o.__name__)
def test_the_specification_is_exact_in_float64(operator: Operator) -> None:
    layout = LAYOUTS["rows without an adapter around and between"]
    segments, rows = segments_of(layout)
    y, vectors = noise(0, rows, 5).double(), noise(1, 6, 5).double()
    expected = y.clone()
    for row, slot in enumerate(slot_of_rows(layout)):
        if slot is not None:
            expected[row] = DEFINITIONS[operator](y[row], vectors[slot])
    spec = getattr(reference, operator.__name__)
    assert torch.equal(spec(y.clone(), vectors, segments), expected)


def test_rows_without_a_segment_do_not_meet_a_nan_of_the_pool() -> None:
    vectors = torch.full((2, 4), float("nan"))
    plan = RowPlan([SlotSegment(1, 2, 0)], 3, CPU)
    for operator in (row_scale, row_add, row_select):
        out = operator(torch.ones(3, 4), vectors, plan)
        assert out[1].isnan().all()
        assert torch.equal(out[[0, 2]], torch.ones(2, 4))


@pytest.mark.parametrize(
    ("segments", "rows", "says"),
    [
        ([SlotSegment(0, 2, 0), SlotSegment(1, 3, 0)], 3, "segments: .1, 3. overlaps"),
        ([SlotSegment(2, 1, 0)], 3, "segments: .2, 1. overlaps"),
        ([SlotSegment(0, 1, -1)], 3, "segments: slot -1"),
        ([SlotSegment(0, 4, 0)], 3, "segments: they end at row 4, the batch has 3"),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused(segments: list[SlotSegment], rows: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RowPlan(segments, rows, CPU)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"y": torch.zeros(2, 5)}, "vectors: want"),
        ({"y": torch.zeros(1, 4)}, "y: 1 rows, the plan was made for 2"),
        ({"vectors": torch.zeros(1, 4)}, "vectors: 1 slots, the plan names 2"),
        ({"vectors": torch.zeros(2, 4).half()}, "vectors: want torch.float32"),
        ({"vectors": torch.zeros(4, 2).T}, "vectors: want a contiguous"),
        ({"y": torch.zeros(2, 4, device="meta")}, "y: on meta"),
        ({"y": torch.zeros(4, 2).T}, "y: rows must be contiguous"),
        ({"y": torch.zeros(1, 4).expand(2, 4)}, "y: rows must be contiguous and lie apart"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_by_name(arguments: dict[str, Any], says: str) -> None:
    plan = RowPlan([SlotSegment(0, 2, 1)], 2, CPU)
    given_: dict[str, Any] = {"y": torch.zeros(2, 4), "vectors": torch.zeros(2, 4), "plan": plan}
    for operator in (row_scale, row_add, row_select):
        with pytest.raises(ValueError, match=says):
            operator(**(given_ | arguments))


def test_a_plan_without_a_capacity_is_not_written_anew() -> None:
    with pytest.raises(ValueError, match="capacity"):
        RowPlan([], 1, CPU).rewrite([], 1)
