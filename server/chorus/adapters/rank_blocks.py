"""Where sites' rank rows lie: those of one width in one block, so that an adapter comes there in few copies.

    A  1024 wide   [q_proj 0, k_proj 0, .., up_proj 11]      each [rows, 1024]
       2816 wide   [down_proj 0, ..]
    B  ...

All sites' rows have the same numbers for an adapter of one rank, and its factors lie one after the other in host memory
(`host_memory.copies`): a copy for each width then, instead of three for each of 84 sites.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.adapters.host_memory import stacked

# Of a piece that is copied at a time, or one site's factors if these are more: what a device needs beside the pools.
_PIECE_BYTES = 16 << 20
# Bytes that a site's rows begin at a multiple of, as an allocation of their own would.
_ALIGNED = 512

Place = slice | Tensor
"""What to index with."""


class _Block(NamedTuple):
    """`memory` [sites, rows, width]: of each of `names`, its rows."""

    memory: Tensor
    names: list[str]


class RankBlocks:
    """`rows` rows of zeros for every site, as wide as `widths` says."""

    def __init__(self, widths: Mapping[str, int], rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._blocks = [
            _block([name for name, its in widths.items() if its == width], rows, width, dtype, device)
            for width in dict.fromkeys(widths.values())
        ]
        self.of = {name: rows for block in self._blocks for name, rows in zip(block.names, block.memory, strict=True)}
        """Each site's rows [rows, width]."""

    def write(self, rows: Place, tensors: Mapping[str, Tensor]) -> None:
        """Copies to the given rows of each site its tensor [rank, width]."""
        for memory, names in self._blocks:
            sites = [i for i, name in enumerate(names) if name in tensors]
            at_once = max(_PIECE_BYTES // tensors[names[sites[0]]].nbytes, 1) if sites else 1
            for first in range(0, len(sites), at_once):
                part = sites[first : first + at_once]
                own = stacked([tensors[names[i]] for i in part])
                memory[_places(part, rows, memory.device)] = own.to(memory.device, memory.dtype)

    def fill(self, rows: Place, numbers: Mapping[str, float]) -> None:
        """Each site's number, all over the given rows of it."""
        for memory, names in self._blocks:
            if sites := [i for i, name in enumerate(names) if name in numbers]:
                own = torch.tensor([numbers[names[i]] for i in sites], dtype=memory.dtype)
                memory[_places(sites, rows, memory.device)] = own[:, None, None].to(memory.device)


def place(numbers: tuple[int, ...] | list[int], device: torch.device) -> Place:
    """What to index with to have these: neighbours are a slice, in half of a list's time."""
    start, count = numbers[0], len(numbers)
    if list(numbers) == list(range(start, start + count)):
        return slice(start, start + count)
    return torch.tensor(numbers, device=device)


def _places(sites: list[int], rows: Place, device: torch.device) -> tuple[Place, Place]:
    """What to index a block with to have those rows of those sites."""
    there = place(sites, device)
    if isinstance(there, Tensor) and isinstance(rows, Tensor):
        return there[:, None], rows
    return there, rows


def _block(names: list[str], rows: int, width: int, dtype: torch.dtype, device: torch.device) -> _Block:
    step = _ALIGNED // dtype.itemsize
    padded = -(-rows * width // step) * step
    memory = torch.zeros(len(names), padded, dtype=dtype, device=device)
    return _Block(memory[:, : rows * width].unflatten(1, (rows, width)), names)
