"""Which row of a batch uses which slot: what `row_scale`, `row_add`, `row_select` and `residual_norm` share.

    entries  row | slot for each row of a segment, in order: rows without one have no entry and no program
    slots    the slot of every row, -1 where it has none: for kernels that compute all rows anyway

int32, built on the host, one upload. With a capacity the buffer has the size of the largest batch and is written anew
in place, so that a CUDA graph replays it; entries that a batch does not need have slot -1, and their programs end at
once.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.kernels.dispatch import runs_triton
from chorus.kernels.types import SlotSegment
from chorus.kernels.upload import to_device, write


class CpuRows(NamedTuple):
    """The rows of all segments on a CPU: a view of the batch where they are neighbours, else an index."""

    first: int
    total: int
    rows: Tensor | None
    slots: Tensor
    """[total]; one alone where all rows use the same."""

    def vectors(self, pool: Tensor) -> Tensor:
        """[total, N], or [1, N] for all."""
        if self.slots.numel() == 1:
            return pool.narrow(0, int(self.slots), 1)
        return pool.index_select(0, self.slots)

    def of(self, y: Tensor) -> Tensor:
        """Their rows of y: a view, or a copy."""
        return y.narrow(0, self.first, self.total) if self.rows is None else y.index_select(0, self.rows)


class RowPlan:
    """How a batch of `rows` rows maps to slots. Shared by all sites where an adapter has the same slot.

    `triton` says whether Triton runs (on CPU tensors only in its interpreter); unless told, it does on CUDA. `capacity`
    is the most rows that any batch written into the plan has.

    Raises:
        ValueError: segments overlap, run backwards, lie outside of the batch or name a negative slot, or the batch is
            larger than the capacity.
    """

    def __init__(
        self,
        segments: Sequence[SlotSegment],
        rows: int,
        device: torch.device,
        *,
        triton: bool | None = None,
        capacity: int | None = None,
    ) -> None:
        self.runs_triton = runs_triton(device, triton)
        self.device = torch.empty(0, device=device).device  # "cuda" is not equal to a tensor's "cuda:0"
        self._capacity = capacity
        self._set(segments, rows)
        self.cpu = _on_cpu(self.segments) if device.type == "cpu" and not self.runs_triton else None
        self.buffer = to_device(self._filled(), device) if self.runs_triton else None

    @property
    def size(self) -> int:
        """Rows that a batch may have: the capacity, or this one's."""
        return self._capacity if self._capacity is not None else self.rows

    @property
    def entries(self) -> int:
        """How many entries the table has, used or not."""
        return self._capacity if self._capacity is not None else self._used

    def rewrite(self, segments: Sequence[SlotSegment], rows: int) -> None:
        """Another batch into the same buffer, on the current stream and without waiting. Needs a capacity."""
        if self._capacity is None or self.buffer is None:
            raise ValueError("capacity: a plan without one is not written anew")
        self._set(segments, rows)
        write(self.buffer, self._filled())

    def _set(self, segments: Sequence[SlotSegment], rows: int) -> None:
        slots_needed = _check(segments, rows)
        if self._capacity is not None and rows > self._capacity:
            raise ValueError(f"rows: {rows}, the capacity is {self._capacity}")
        self.slots_needed = slots_needed
        self.segments = tuple(s for s in segments if s.start < s.end)
        self.rows = rows
        self._used = sum(s.end - s.start for s in self.segments)

    @cached_property
    def slot_of_row(self) -> Tensor:
        """[rows], int32, on the host; -1 where a row has none. For a CPU's kernels, whose plan is not written anew."""
        return _dense(*_pairs(self.segments), self.rows)

    def _filled(self) -> Tensor:
        """Entries [n, 2], then slots [n]."""
        rows, slots = _pairs(self.segments)
        unused = self.entries - len(rows)
        dense = _dense(rows, slots, self.size)
        entries = torch.stack((rows.int(), slots), dim=1).flatten()
        return torch.cat((entries, torch.tensor([0, -1] * unused, dtype=torch.int32), dense))


def _pairs(segments: Sequence[SlotSegment]) -> tuple[Tensor, Tensor]:
    """Row (int64) and slot (int32) of all rows of segments."""
    rows = torch.tensor(list(chain.from_iterable(range(s.start, s.end) for s in segments)), dtype=torch.int64)
    slots = torch.tensor([s.slot for s in segments], dtype=torch.int32)
    lengths = torch.tensor([s.end - s.start for s in segments], dtype=torch.int64)
    return rows, slots.repeat_interleave(lengths)


def _dense(rows: Tensor, slots: Tensor, size: int) -> Tensor:
    """The slot of each row of a batch of `size`."""
    dense = torch.full((size,), -1, dtype=torch.int32)
    dense[rows] = slots
    return dense


def _on_cpu(segments: Sequence[SlotSegment]) -> CpuRows | None:
    if not segments:
        return None
    rows, slots = _pairs(segments)
    first, count = segments[0].start, len(rows)
    together = segments[-1].end - first == count
    same = len({s.slot for s in segments}) == 1
    return CpuRows(first, count, None if together else rows, slots[:1] if same else slots)


def _check(segments: Sequence[SlotSegment], rows: int) -> int:
    """How many slots a pool must have at least."""
    end = needed = 0
    for s in segments:
        if s.start < end or s.end < s.start:
            raise ValueError(f"segments: [{s.start}, {s.end}) overlaps the one before or runs backwards")
        if s.slot < 0:
            raise ValueError(f"segments: slot {s.slot} is negative")
        end, needed = s.end, max(needed, s.slot + 1)
    if end > rows:
        raise ValueError(f"segments: they end at row {end}, the batch has {rows}")
    return needed
