"""What the kernel of `head` reads about a batch: tiles, int32, built on the host, one upload.

    tile   row | rows | first row of the weights | rows of the weights

Three lists: dense layers, heads over their outputs, heads over x. With a `HeadCapacity` each has the size of the worst
case, every row another head's, and is written anew in place for replays of a CUDA graph; tiles that a batch does not
need have 0 rows, and their programs end at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.kernels.pointwise_tuning import HEAD_ROWS
from chorus.kernels.types import HeadSegment
from chorus.kernels.upload import to_device, write

TILE_FIELDS = 4


@dataclass(frozen=True, slots=True)
class HeadCapacity:
    """The largest batch of a static plan: rows, labels of any head."""

    rows: int
    labels: int


class HeadGeometry(NamedTuple):
    """Tiles of each list, which lie one after the other: dense layers, heads over them, heads over x."""

    dense: int
    after_dense: int
    direct: int


class HeadTables:
    """A batch's tables on `device`.

    Raises:
        ValueError: the batch exceeds the capacity.
    """

    def __init__(
        self, segments: Sequence[HeadSegment], rows: int, device: torch.device, capacity: HeadCapacity | None
    ) -> None:
        self._capacity = capacity
        self._check(segments, rows)
        if capacity is None:
            two, one = (
                _count(s for s in segments if s.dense is not None),
                _count(s for s in segments if s.dense is None),
            )
            self.geometry = HeadGeometry(two, two, one)
        else:
            self.geometry = HeadGeometry(capacity.rows, capacity.rows, capacity.rows)
        self.flat_geometry = list(self.geometry)
        self.buffer = to_device(self._filled(segments), device)

    def rewrite(self, segments: Sequence[HeadSegment], rows: int) -> None:
        """Writes another batch into the same buffer, on the current stream and without waiting."""
        if self._capacity is None:
            raise ValueError("capacity: a plan without one is not written anew")
        check_segments(segments, rows)
        self._check(segments, rows)
        write(self.buffer, self._filled(segments))

    def _check(self, segments: Sequence[HeadSegment], rows: int) -> None:
        labels = max((s.labels for s in segments), default=0)
        if self._capacity is not None and (rows > self._capacity.rows or labels > self._capacity.labels):
            raise ValueError(f"segments: {rows} rows of up to {labels} labels exceed {self._capacity}")

    def _filled(self, segments: Sequence[HeadSegment]) -> Tensor:
        lists: tuple[list[int], list[int], list[int]] = ([], [], [])
        for s in segments:
            for row in range(s.start, s.end, HEAD_ROWS):
                rows = min(HEAD_ROWS, s.end - row)
                if s.dense is not None:
                    lists[0].extend((row, rows, s.dense, 0))
                lists[2 if s.dense is None else 1].extend((row, rows, s.first, s.labels))
        padded = [
            filled + [0] * (count * TILE_FIELDS - len(filled))
            for filled, count in zip(lists, self.geometry, strict=True)
        ]
        return torch.tensor([*padded[0], *padded[1], *padded[2]], dtype=torch.int32)


def check_segments(segments: Sequence[HeadSegment], rows: int) -> tuple[int, int]:
    """How many label rows and dense layers a pool must have at least.

    Raises:
        ValueError: segments overlap, run backwards, lie outside of the batch, have no labels or negative places.
    """
    end = labels = dense = 0
    for s in segments:
        if s.start < end or s.end < s.start:
            raise ValueError(f"segments: [{s.start}, {s.end}) overlaps the one before or runs backwards")
        if s.first < 0 or s.labels < 1 or (s.dense is not None and s.dense < 0):
            raise ValueError(f"segments: {s} has no labels or a negative place")
        end, labels = s.end, max(labels, s.first + s.labels)
        dense = dense if s.dense is None else max(dense, s.dense + 1)
    if end > rows:
        raise ValueError(f"segments: they end at row {end}, the batch has {rows}")
    return labels, dense


def _count(segments: Iterable[HeadSegment]) -> int:
    return sum(-(-(s.end - s.start) // HEAD_ROWS) for s in segments)
