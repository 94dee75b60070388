"""Where sites' rank rows lie: those of one width in one block, so that an adapter comes there in few copies.

    A  1024 wide   [q_proj 0, k_proj 0, .., up_proj 11]      each [rows, 1024]
       2816 wide   [down_proj 0, ..]
    B  ...

All sites' rows have the same numbers for an adapter of one rank, and its factors of one shape lie together in host
memory (`lowered.Stack`): a copy for each width then, instead of three for each of 84 sites.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.adapters.lowered import Stack
from chorus.adapters.rank_pages import Rows

# Of a piece that is copied at a time, or one site's factors if these are more: what a device needs beside the pools.
_PIECE_BYTES = 16 << 20
# Bytes that a site's rows begin at a multiple of, as an allocation of their own would.
_ALIGNED = 512

Place = slice | Tensor
"""What to index with."""


class _Block(NamedTuple):
    """`memory` [sites, rows, width]: of each site of `numbers`, at its number, its rows."""

    memory: Tensor
    numbers: dict[str, int]

    def places(self, sites: Sequence[str], rows: Rows) -> tuple[Place, Place]:
        """What to index with to have those rows of those sites."""
        there = place([self.numbers[site] for site in sites], self.memory.device)
        own = place(rows, self.memory.device)
        if isinstance(there, Tensor) and isinstance(own, Tensor):
            return there[:, None], own
        return there, own


class RankBlocks:
    """`rows` rows of zeros for every site, as wide as `widths` says."""

    def __init__(self, widths: Mapping[str, int], rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._block_of: dict[str, _Block] = {}
        self.of: dict[str, Tensor] = {}
        """Each site's rows [rows, width]."""
        for width in dict.fromkeys(widths.values()):
            block = _block([name for name, its in widths.items() if its == width], rows, width, dtype, device)
            self._block_of |= dict.fromkeys(block.numbers, block)
            self.of |= zip(block.numbers, block.memory, strict=True)

    def write(self, rows: Mapping[str, Rows], stack: Stack) -> None:
        """Copies to each of the stack's sites, at its rows, what is the site's. All are as wide as each other."""
        block = self._block_of[stack.sites[0]]
        at_once = max(_PIECE_BYTES * len(stack.sites) // stack.memory.nbytes, 1)
        for there, sites in _alike(rows, stack.sites):
            for first in range(0, len(sites), at_once):
                part = sites[first : first + at_once]
                names = [stack.sites[i] for i in part]
                own = stack.memory[place(part, stack.memory.device)]
                block.memory[block.places(names, there)] = own.to(block.memory.device, block.memory.dtype)

    def fill(self, rows: Mapping[str, Rows], numbers: Mapping[str, float]) -> None:
        """Each site's number, all over its rows. All are as wide as each other."""
        names = list(numbers)
        block = self._block_of[names[0]]
        for there, sites in _alike(rows, names):
            own = torch.tensor([numbers[names[i]] for i in sites], dtype=block.memory.dtype)
            block.memory[block.places([names[i] for i in sites], there)] = own[:, None, None].to(block.memory.device)


def _alike(rows: Mapping[str, Rows], sites: Sequence[str]) -> list[tuple[Rows, list[int]]]:
    """Rows, and which of the sites have these. Told apart by identity: most adapters have one tuple for all."""
    found: dict[int, tuple[Rows, list[int]]] = {}
    for i, site in enumerate(sites):
        own = rows[site]
        found.setdefault(id(own), (own, []))[1].append(i)
    return list(found.values())


def place(numbers: Sequence[int], device: torch.device) -> Place:
    """What to index with to have these: neighbours are a slice, in half of a list's time."""
    start, count = numbers[0], len(numbers)
    if list(numbers) == list(range(start, start + count)):
        return slice(start, start + count)
    return torch.tensor(numbers, device=device)


def _block(names: list[str], rows: int, width: int, dtype: torch.dtype, device: torch.device) -> _Block:
    step = _ALIGNED // dtype.itemsize
    padded = -(-rows * width // step) * step
    memory = torch.zeros(len(names), padded, dtype=dtype, device=device)
    return _Block(memory[:, : rows * width].unflatten(1, (rows, width)), {name: i for i, name in enumerate(names)})
