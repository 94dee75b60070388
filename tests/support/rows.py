"""Batches whose rows use slots of a pool, and the bound on errors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import strategies as st

from chorus.kernels import SlotSegment

Layout = list[tuple[int, int | None]]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# RMS(err) / RMS(ref), and max |err| / (RMS(ref) + |ref|) beside it: each value is rounded in its own binade.
BOUND = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (4e-3, 2e-2),
    torch.bfloat16: (4e-3, 2e-2),
}
LAYOUTS: dict[str, Layout] = {
    "a decode step, all distinct": [(1, slot) for slot in (3, 0, 5, 1)],
    "rows without an adapter around and between": [(2, None), (3, 1), (1, None), (1, 0), (2, None)],
    "one giant segment": [(40, 2)],
    "empty segments": [(0, 1), (3, 0), (0, 2)],
    "one slot twice": [(1, 4), (2, None), (1, 4)],
    "no adapter": [(3, None)],
}
layouts = st.lists(st.tuples(st.integers(0, 4), st.one_of(st.none(), st.integers(0, 5))), min_size=1, max_size=5)


def segments_of(layout: Layout) -> tuple[list[SlotSegment], int]:
    """Neighbouring segments of (rows, slot), and the rows in all; None stands for rows without one."""
    segments, row = [], 0
    for count, slot in layout:
        if slot is not None:
            segments.append(SlotSegment(row, row + count, slot))
        row += count
    return segments, row


def slot_of_rows(layout: Layout) -> list[int | None]:
    return [slot for count, slot in layout for _ in range(count)]


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_close(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """`exact` is float64 math on the same inputs."""
    assert exact.dtype == torch.float64
    if not exact.numel():
        return
    error, scale = got.cpu().double() - exact, float(exact.square().mean().sqrt())
    rms_bound, max_bound = BOUND[dtype]
    assert float(error.square().mean().sqrt()) <= rms_bound * scale
    assert bool((error.abs() <= max_bound * (scale + exact.abs())).all())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What torch allocates and nobody writes is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
