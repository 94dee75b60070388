"""The check of row_scale, row_add and row_select against their definition, row by row."""

from collections.abc import Callable

import torch
from torch import Tensor

from chorus.kernels import RowPlan, row_add, row_scale, row_select
from support.rows import Layout, check_close, noise, segments_of, slot_of_rows

SLOTS = 6
DEFINITIONS: dict[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]] = {
    row_scale: lambda y, v: y * v,
    row_add: lambda y, v: y + v,
    row_select: lambda y, v: v,
}


def check(
    operator: Callable[..., Tensor], layout: Layout, width: int, dtype: torch.dtype,
    pool_dtype: torch.dtype, *, strided: bool = False, seed: int = 0, plan: RowPlan | None = None,
    device: str = "cpu", triton: bool | None = None,
) -> None:  # fmt: skip
    """y0 random and 0: within the bound, untouched elsewhere (columns of neighbours too), the same bits again."""
    segments, rows = segments_of(layout)
    plan = plan or RowPlan(segments, rows, torch.device(device), triton=triton)
    vectors = noise(seed, SLOTS, width).to(pool_dtype)
    vectors[[s for s in range(SLOTS) if s not in {slot for _, slot in layout}]] = float("nan")
    outer = 3 if strided else 0
    for start in (noise(seed + 1, rows, width + 2 * outer).to(dtype), torch.zeros(rows, width + 2 * outer).to(dtype)):
        expected = start.double()
        touched = torch.zeros_like(start, dtype=torch.bool)
        for row, slot in enumerate(slot_of_rows(layout)):
            if slot is not None:
                columns = slice(outer, outer + width)
                expected[row, columns] = DEFINITIONS[operator](expected[row, columns], vectors[slot].double())
                touched[row, columns] = True
        outcomes = []
        for _ in range(2):
            y = start.to(device, copy=True)
            part = y[:, outer : outer + width]
            returned = operator(part, vectors.to(device), plan)
            assert returned.data_ptr() == part.data_ptr()
            outcomes.append(y.cpu())
        check_close(outcomes[0][touched], expected[touched], dtype)
        assert torch.equal(outcomes[0][~touched], start[~touched])
        assert torch.equal(*outcomes)
