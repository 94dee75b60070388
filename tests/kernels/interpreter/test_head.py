"""`head` on Triton, in the interpreter, against torch's linears row by row."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.kernels import HeadPlan, HeadPool
from chorus.kernels.head_launch import head_op
from chorus.kernels.head_tables import HeadCapacity
from support.heads import ACTIVATIONS, LAYOUTS, Layout, check, make_pool, segments_of
from support.rows import DTYPES, noise

CPU = torch.device("cpu")
layouts = st.lists(st.tuples(st.sampled_from([0, 1, 2, 18]), st.integers(0, 5), st.booleans()), min_size=1, max_size=3)


@settings(max_examples=12, deadline=None)
@given(
    layout=layouts, width=st.sampled_from([16, 33, 144]), dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)), strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_logits_are_those_of_each_rows_own_layers(
    layout: Layout, width: int, dtype: torch.dtype, activation: Any, strided: bool, seed: int
) -> None:
    if dtype is not torch.float32:
        layout = [*layout, (30, 6, True)]  # an RMS of a few roundings means nothing
    check(layout, width, dtype, activation, strided=strided, seed=seed, triton=True)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_real_batches(layout: Layout) -> None:
    check(layout, 48, torch.float32, triton=True)


def test_a_capacity_holds_any_batch_in_the_same_buffer() -> None:
    """The largest first and last: nothing is left out, whatever the tables held before."""
    full: Layout = [(1, 17 - i, i % 2 == 0) for i in range(5)]
    plan = HeadPlan([], 0, CPU, triton=True, capacity=HeadCapacity(5, 17))
    assert plan.tables is not None
    buffer = plan.tables.buffer
    batches: list[Layout] = [full, [(2, 3, True), (2, 4, False)], [(3, 0, False)], full]
    for layout in batches:
        plan.rewrite(*segments_of(layout))
        assert plan.tables.buffer is buffer
        check(layout, 16, torch.float32, plan=plan)
    with pytest.raises(ValueError, match="segments: 6 rows of up to 0 labels exceed"):
        plan.rewrite([], 6)
    with pytest.raises(ValueError, match="segments: 1 rows of up to 18 labels exceed"):
        plan.rewrite(*segments_of([(1, 18, False)]))


def test_the_op_is_what_torch_expects_of_ops() -> None:
    layout = LAYOUTS["both kinds, uneven, rows without between"]
    segments, rows = segments_of(layout)
    plan = HeadPlan(segments, rows, CPU, triton=True)
    assert plan.tables is not None
    pool = HeadPool(*(t.nan_to_num() for t in make_pool(layout, 16, torch.float32, 0) if t is not None))
    torch.library.opcheck(
        head_op, (noise(0, rows, 16), *pool, plan.tables.buffer, plan.tables.flat_geometry, plan.width, "tanh")
    )


def test_float64_runs_on_the_specification() -> None:
    check([(2, 3, True), (1, 2, False)], 8, torch.float64, triton=True)
