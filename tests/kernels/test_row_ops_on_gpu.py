"""row_scale, row_add and row_select on a CUDA device; and replayed in a CUDA graph."""

from collections.abc import Callable

import pytest
import torch

from chorus.kernels import RowPlan, row_add
from support.row_ops import DEFINITIONS, check
from support.rows import DTYPES, LAYOUTS, Layout, noise, segments_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("operator", DEFINITIONS, ids=lambda o: o.__name__)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_row_operators_are_their_definition_row_by_row(
    operator: Callable[..., torch.Tensor], layout: Layout, dtype: torch.dtype, strided: bool
) -> None:
    for width in (4096, 33):
        check(operator, layout, width, dtype, torch.float32, strided=strided, device="cuda")


def test_a_graph_replays_other_batches_of_its_capacity() -> None:
    y, vectors = noise(0, 8, 512).cuda(), noise(1, 6, 512).cuda()
    plan = RowPlan([], 0, torch.device("cuda"), capacity=8)
    row_add(y, vectors, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        row_add(y, vectors, plan)
    batches: list[Layout] = [[(1, i % 6) for i in range(8)], [(2, None), (5, 3)], [(8, None)]]
    for layout in batches:
        segments, rows = segments_of(layout)
        before = y.cpu()
        plan.rewrite(segments, rows)
        graph.replay()
        here = RowPlan(segments, rows, torch.device("cpu"))
        assert torch.equal(y.cpu(), row_add(before, vectors.cpu(), here))
