"""What one launch of `low_rank` is told of its members: the outputs of one x, their pools and their tables.

A member's tensors are found from the first one's by how many elements they lie apart (`triton_low_rank`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from chorus.kernels.low_rank_tables import Geometry, TileGroup
from chorus.kernels.tuning import SLOT_LANES, Family, block_rows
from chorus.kernels.types import Epilogue

MEMBERS = 3
"""Outputs of one launch: q, k and v."""


class Member(NamedTuple):
    """One output of a call, its pool's tensors and its tables. Only the one member of a launch has an epilogue."""

    y: Tensor
    a: Tensor
    b: Tensor
    mid_scale: Tensor
    tables: Tensor
    how: Geometry
    epilogue: Epilogue = Epilogue()


Own = tuple[Member, TileGroup]
"""A member, and its tiles of the family that is launched."""


def shrink_programs(own: Sequence[Own]) -> list[int]:
    """How many programs each member has along the grid's first axis: tiles, or SLOTS' blocks of rows."""
    return [group.expand_count if group.family is Family.SLOTS else group.shrink_count for _, group in own]


def shrink_tables(own: Sequence[Own]) -> dict[str, Tensor | int]:
    """Pointers to the members' tiles for the shrink, and to their pages."""
    found = _lists("tiles", own, [group.shrink_at for _, group in own]) | _pages(own)
    return found | (_blocks(own) if own[0][1].family is Family.SLOTS else {})


def expand_tables(own: Sequence[Own]) -> dict[str, Tensor | int]:
    """The same for the expand. SLOTS has the shrink's."""
    if own[0][1].family is Family.SLOTS:
        return shrink_tables(own)
    return _lists("tiles", own, [group.expand_at for _, group in own]) | _pages(own)


def shrink_rows_and_lanes(group: TileGroup) -> dict[str, int]:
    """How many rows and rank lanes a program of the shrink has."""
    if group.family is Family.SLOTS:
        return tile_rows(group.family) | {"BLOCK_R": SLOT_LANES, "CHUNK": group.block_rank}
    return tile_rows(group.family) | {"BLOCK_R": group.block_rank}


def tile_rows(family: Family) -> dict[str, int]:
    """Rows of a program, where the kernel does not know them."""
    return {} if family is Family.ROWS else {"BLOCK_M": block_rows(family)}


def _lists(name: str, own: Sequence[Own], begins: Sequence[int]) -> dict[str, Tensor | int]:
    """A pointer to the first member's list, which begins at begins[0] in its buffer, and steps to the others'."""
    parts = [member.tables[begin:] for (member, _), begin in zip(own, begins, strict=True)]
    return {f"{name}_ptr": parts[0], **steps(name, parts)}


def steps(name: str, tensors: Sequence[Tensor]) -> dict[str, int]:
    """How many elements the second and third tensor lie after the first."""
    first, size = tensors[0].data_ptr(), tensors[0].element_size()
    apart = [(tensor.data_ptr() - first) // size for tensor in tensors[1:]]
    return {f"{name}_step_{i + 1}": step for i, step in enumerate([*apart, 0, 0][: MEMBERS - 1])}


def each(name: str, values: Sequence[int]) -> dict[str, int]:
    """A number for each member."""
    return {f"{name}_{i}": value for i, value in enumerate([*values, 0, 0][:MEMBERS])}


def _pages(own: Sequence[Own]) -> dict[str, Tensor | int]:
    return _lists("pages", own, [member.how.pages_at for member, _ in own])


def _blocks(own: Sequence[Own]) -> dict[str, Tensor | int]:
    return _lists("blocks", own, [group.expand_at for _, group in own])
