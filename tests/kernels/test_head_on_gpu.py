"""`head` on a CUDA device; and replayed in a CUDA graph."""

from typing import Any

import pytest
import torch

from chorus.kernels import HeadPlan, HeadPool, head
from chorus.kernels.head_tables import HeadCapacity
from support.heads import ACTIVATIONS, LAYOUTS, Layout, check, exact, make_pool, segments_of
from support.rows import DTYPES, check_close, noise

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [33, 768])
def test_logits_are_those_of_each_rows_own_layers(
    layout: Layout, dtype: torch.dtype, activation: Any, width: int
) -> None:
    check([*layout, (30, 6, True)], width, dtype, activation, strided=True, device="cuda")


def test_a_graph_replays_other_batches_of_its_capacity() -> None:
    full: Layout = [(1, 17 - i, i % 2 == 0) for i in range(6)]
    batches: list[Layout] = [full, [(2, 3, True), (2, 4, False)], [(6, 0, False)]]
    pool = HeadPool(*(t.nan_to_num() for t in make_pool(full, 64, torch.float32, 0) if t is not None))
    x = noise(0, 6, 64)
    there, there_x = HeadPool(*(t.cuda() for t in pool if t is not None)), x.cuda()
    plan = HeadPlan([], 0, torch.device("cuda"), capacity=HeadCapacity(6, 17))
    head(there_x, there, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = head(there_x, there, plan)
    for layout in batches:
        segments, rows = segments_of(layout)
        plan.rewrite(segments, rows)
        graph.replay()
        check_close(logits, exact(x, pool, segments, 17, "tanh"), torch.float32)
