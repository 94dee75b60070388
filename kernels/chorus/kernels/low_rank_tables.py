"""What the kernels of `low_rank` read about a batch: tiles and rank pages, int32, built on the host, one upload.

    lists  tiles, and blocks of rows (`low_rank_lists`)
    pages  the pool pages of each segment, one after the other: page p is the pool's rows 8 p .. 8 p + 7

Each family (`tuning.Family`) in the batch has two lists of tiles. The shrink's are cut by rows and by rank, so that a
batch of mixed ranks costs the sum of its ranks; the expand's by rows alone, since an output needs every rank lane.
SLOTS has tiles cut by rank alone, and blocks of rows.

With a `Capacity` the buffer has the size of the worst case and is written anew in place, so a CUDA graph that was
captured with it replays for any batch within the capacity. Tiles that a batch does not need have 0 rows, and their
programs end at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus.kernels.low_rank_lists import BLOCK_FIELDS, PAGE_ROWS, TILE_FIELDS, Placed, slot_lists, tile_lists
from chorus.kernels.tuning import Family, block_rows, family_of, rank_block
from chorus.kernels.types import LowRankSegment
from chorus.kernels.upload import to_device, write

# Lists begin at multiples of 16 bytes: what Triton specialises pointers for.
_ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class Capacity:
    """The largest batch that a static plan holds: rows, and rank of any segment. All segments get one family.

    `activated` says whether segments may have an activation.
    """

    rows: int
    rank: int
    family: Family
    activated: bool = False


class TileGroup(NamedTuple):
    """One family's tiles: where its two lists begin in the buffer, how many there are, rank lanes of a program.

    Of SLOTS the first list is its tiles, the second its blocks.
    """

    family: Family
    block_rank: int
    shrink_at: int
    shrink_count: int
    expand_at: int
    expand_count: int


class Geometry(NamedTuple):
    """How to read the buffer. As a flat list of ints it passes through a custom op."""

    columns: int
    pages_at: int
    activated: bool
    groups: tuple[TileGroup, ...]

    def flat(self) -> list[int]:
        return [
            self.columns,
            self.pages_at,
            int(self.activated),
            *(number for group in self.groups for number in group),
        ]

    @classmethod
    def of(cls, flat: Sequence[int]) -> "Geometry":
        groups = [flat[i : i + 6] for i in range(3, len(flat), 6)]
        return cls(flat[0], flat[1], bool(flat[2]), tuple(TileGroup(Family(g[0]), *g[1:]) for g in groups))


class LowRankTables:
    """A batch's tables on `device`.

    Raises:
        ValueError: a segment's pool rows are not whole pages in order, or the batch exceeds the capacity.
    """

    def __init__(
        self,
        segments: Sequence[LowRankSegment],
        device: torch.device,
        capacity: Capacity | None,
        *,
        buffer: Tensor | None = None,
    ) -> None:
        self._capacity = capacity
        used = [s for s in segments if s.acts]
        self.geometry = _geometry(used) if capacity is None else _worst_case(capacity)
        self.flat_geometry = self.geometry.flat()
        check_capacity(used, self._capacity)
        self._used = used
        self._gradient: tuple[int, Tensor] | None = None
        self.buffer = to_device(_fill(used, self.geometry, capacity), device) if buffer is None else buffer

    @classmethod
    def together(cls, batches: Sequence[Sequence[LowRankSegment]], device: torch.device) -> list["LowRankTables"]:
        """Tables of several batches, in one upload."""
        hosts = []
        for segments in batches:
            used = [s for s in segments if s.acts]
            host = _fill(used, _geometry(used), None)
            hosts.append(F.pad(host, (0, _aligned(host.numel()) - host.numel())))
        parts = to_device(torch.cat(hosts), device).split([host.numel() for host in hosts]) if hosts else ()
        return [cls(s, device, None, buffer=part) for s, part in zip(batches, parts, strict=True)]

    def rewrite(self, segments: Sequence[LowRankSegment]) -> None:
        """Writes another batch into the same buffer, on the current stream and without waiting."""
        if self._capacity is None:
            raise ValueError("capacity: tables without one are not written anew")
        used = [s for s in segments if s.acts]
        check_capacity(used, self._capacity)
        host = _fill(used, self.geometry, self._capacity)
        write(self.buffer, host)
        self._used, self._gradient = used, None

    def gradient_tiles(self) -> tuple[int, Tensor]:
        """Rank lanes of a program, and tiles [n, TILE_FIELDS] of whole segments, for the gradients of A and B.

        Raises:
            ValueError: two segments share pool rows, so that two programs would write them.
        """
        if self._gradient is None:
            block = rank_block(Family.GROUPED, max(len(s.pool_rows) for s in self._used))
            tiles, pages = [], 0
            for s in self._used:
                rank = len(s.pool_rows)
                for lane in range(0, rank, block):
                    first_page = pages + lane // PAGE_ROWS
                    tiles.append((s.start, s.end - s.start, first_page, min(block, rank - lane), lane, 0, -1))
                pages += _ceil(rank, PAGE_ROWS)
            owned = [row for s in self._used for row in s.pool_rows]
            if len(owned) != len(set(owned)):
                raise ValueError("segments: two share pool rows, whose gradient has one writer")
            self._gradient = block, to_device(torch.tensor(tiles, dtype=torch.int32), self.buffer.device)
        return self._gradient


class StaticTables:
    """Tables of `count` sites in one buffer of the worst case, all written anew in one upload: for CUDA graphs."""

    def __init__(self, count: int, capacity: Capacity, device: torch.device) -> None:
        self._capacity, self._geometry = capacity, _worst_case(capacity)
        nothing = self._host(())
        self._buffer = to_device(nothing.expand(count, -1).contiguous(), device)
        self.tables = [LowRankTables((), device, capacity, buffer=own) for own in self._buffer]

    def rewrite(self, batches: Sequence[Sequence[LowRankSegment]], batch_of: Sequence[int]) -> None:
        """Site i gets batches[batch_of[i]], on the current stream and without waiting.

        Raises:
            ValueError: a batch exceeds the capacity; nothing is written then.
        """
        hosts = []
        for segments in batches:
            used = [s for s in segments if s.acts]
            check_capacity(used, self._capacity)
            hosts.append(self._host(used))
        write(self._buffer, torch.stack(hosts)[torch.tensor(batch_of, dtype=torch.int64)])

    def _host(self, segments: Sequence[LowRankSegment]) -> Tensor:
        host = _fill(segments, self._geometry, self._capacity)
        return F.pad(host, (0, _aligned(host.numel()) - host.numel()))


@lru_cache(maxsize=4096)
def pages_of(pool_rows: tuple[int, ...]) -> tuple[int, ...]:
    """The pages that hold an adapter's pool rows.

    Raises:
        ValueError: they are not whole pages in order; the last may be used in part.
    """
    pages = []
    for i in range(0, len(pool_rows), PAGE_ROWS):
        first, part = pool_rows[i], pool_rows[i : i + PAGE_ROWS]
        if first % PAGE_ROWS or part != tuple(range(first, first + len(part))):
            raise ValueError(f"segments: pool rows {part} are not a page of {PAGE_ROWS}")
        pages.append(first // PAGE_ROWS)
    return tuple(pages)


def check_capacity(segments: Sequence[LowRankSegment], capacity: Capacity | None) -> None:
    """
    Raises:
        ValueError: the segments that act exceed the capacity.
    """
    if capacity is None or not segments:
        return
    rank = max(len(s.pool_rows) for s in segments)
    if segments[-1].end > capacity.rows or rank > capacity.rank:
        raise ValueError(f"segments: {segments[-1].end} rows of rank {rank} exceed {capacity}")
    if not capacity.activated and any(s.activation for s in segments):
        raise ValueError("segments: the capacity is of batches without activations")


def _geometry(segments: Sequence[LowRankSegment]) -> Geometry:
    """Lists as long as the batch needs them."""
    sizes = []
    for family in Family:
        members = [s for s in segments if family_of(s.end - s.start) is family]
        if members:
            block = rank_block(family, max(len(s.pool_rows) for s in members))
            tiles = [(_ceil(s.end - s.start, block_rows(family)), _ceil(len(s.pool_rows), block)) for s in members]
            shrinks, expands = sum(rows * ranks for rows, ranks in tiles), sum(rows for rows, _ in tiles)
            sizes.append((family, block, max(ranks for _, ranks in tiles) * block, shrinks, expands))
    return _laid_out(sizes, any(s.activation for s in segments))


def _worst_case(capacity: Capacity) -> Geometry:
    """Every row another adapter's, each of the largest rank: no batch has more tiles."""
    block = rank_block(capacity.family, capacity.rank)
    ranks = _ceil(capacity.rank, block)
    tiles, seconds = capacity.rows * ranks, capacity.rows
    if capacity.family is Family.SLOTS:
        tiles, seconds = capacity.rows * max(ranks, 1), _ceil(capacity.rows, block_rows(Family.SLOTS))
    return _laid_out([(capacity.family, block, ranks * block, tiles, seconds)], capacity.activated)


def _laid_out(sizes: Iterable[tuple[Family, int, int, int, int]], activated: bool) -> Geometry:
    """Lists one after the other, from (family, rank block, columns, shrink tiles, expand tiles) each."""
    groups, at, widest = [], 0, 0
    for family, block, columns, shrinks, expands in sizes:
        expand_at = at + _aligned(shrinks * TILE_FIELDS)
        groups.append(TileGroup(family, block, at, shrinks, expand_at, expands))
        at = expand_at + _aligned(expands * (BLOCK_FIELDS if family is Family.SLOTS else TILE_FIELDS))
        widest = max(widest, columns)
    return Geometry(widest, at, activated, tuple(groups))


def _fill(segments: Sequence[LowRankSegment], geometry: Geometry, capacity: Capacity | None) -> Tensor:
    """The buffer on the host."""
    pages: list[int] = []
    placed: dict[Family, list[Placed]] = {group.family: [] for group in geometry.groups}
    for s in segments:
        family = capacity.family if capacity is not None else family_of(s.end - s.start)
        placed[family].append((s, len(pages)))
        pages += pages_of(s.pool_rows)
    page_entries = len(pages) if capacity is None else capacity.rows * _ceil(capacity.rank, PAGE_ROWS)
    buffer = [0] * (geometry.pages_at + page_entries)
    for group in geometry.groups:
        own = placed[group.family]
        if group.family is Family.SLOTS:
            shrinks, expands = slot_lists(own, group.expand_count, group.block_rank)
        else:
            shrinks, expands = tile_lists(own, group.family, group.block_rank)
        buffer[group.shrink_at : group.shrink_at + len(shrinks)] = shrinks
        buffer[group.expand_at : group.expand_at + len(expands)] = expands
    buffer[geometry.pages_at : geometry.pages_at + len(pages)] = pages
    return torch.tensor(buffer, dtype=torch.int32)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _aligned(count: int) -> int:
    return _ceil(count, _ALIGNMENT) * _ALIGNMENT
