"""Sites' rank rows in blocks: each site has its own, and gets what is its."""

import pytest
import torch
from torch import Tensor

from chorus.adapters import rank_blocks
from chorus.adapters.host_memory import stacks
from chorus.adapters.rank_blocks import RankBlocks, place

WIDTHS = {"q 0": 6, "down 0": 10, "q 1": 6, "k 1": 6, "down 1": 10, "head": 7}
ROWS = 24
CPU = torch.device("cpu")


def blocks(dtype: torch.dtype = torch.float32) -> RankBlocks:
    return RankBlocks(WIDTHS, ROWS, dtype, CPU)


def factors(names: list[str], rank: int) -> dict[str, Tensor]:
    return {name: torch.randn(rank, WIDTHS[name]) for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_site_has_rows_of_its_own_where_an_allocation_might_begin(dtype: torch.dtype) -> None:
    of = blocks(dtype).of
    assert {name: tuple(rows.shape) for name, rows in of.items()} == {name: (ROWS, n) for name, n in WIDTHS.items()}
    for i, rows in enumerate(of.values()):
        assert rows.is_contiguous()
        rows.fill_(i + 1)
    assert [rows.unique().tolist() for rows in of.values()] == [[i + 1] for i in range(len(WIDTHS))]
    begins = [of[name].data_ptr() - of["q 0"].data_ptr() for name in ("q 1", "k 1")]
    assert all(begin > 0 and begin % 512 == 0 for begin in begins)


@pytest.mark.parametrize("rows", [(8, 9, 10, 11), (0, 1, 2, 3), (4, 5, 16, 17), (23, 2, 7, 11)])
@pytest.mark.parametrize(
    "names", [list(WIDTHS), ["q 1"], ["q 0", "k 1"], ["down 1", "head"], ["q 1", "k 1", "down 0"]], ids="+".join
)
@pytest.mark.parametrize("piece_bytes", [1, 200, 1 << 20])  # a site at a time, two of the narrow ones, all
def test_factors_come_to_their_rows_of_their_sites_and_nowhere_else(
    names: list[str], rows: tuple[int, ...], piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_blocks, "_PIECE_BYTES", piece_bytes)
    memory, own = blocks(), factors(names, len(rows))
    for stack in stacks(own, torch.float32):
        memory.write(dict.fromkeys(WIDTHS, rows), stack)
    for name, there in memory.of.items():
        wanted = torch.zeros(ROWS, WIDTHS[name])
        if name in own:
            wanted[list(rows)] = own[name]
        assert torch.equal(there, wanted), name


def test_sites_of_one_stack_may_have_rows_of_their_own() -> None:
    memory, own = blocks(), factors(["q 0", "q 1", "k 1"], 2)
    rows = {"q 0": (8, 9), "q 1": (3, 17), "k 1": (8, 9)}
    (stack,) = stacks(own, torch.float32)
    memory.write(rows, stack)
    for name, there in memory.of.items():
        wanted = torch.zeros(ROWS, WIDTHS[name])
        if name in own:
            wanted[list(rows[name])] = own[name]
        assert torch.equal(there, wanted), name


@pytest.mark.parametrize("rows", [(8, 9, 10), (2, 7, 11)])
def test_a_number_fills_its_rows_of_its_site(rows: tuple[int, ...]) -> None:
    memory, numbers = blocks(), {"q 0": 0.5, "k 1": 2.0}
    memory.fill(dict.fromkeys(WIDTHS, rows), numbers)
    for name, there in memory.of.items():
        total = numbers.get(name, 0.0) * WIDTHS[name]
        assert there.sum(1).tolist() == [total if row in rows else 0.0 for row in range(ROWS)], name


def test_factors_of_another_dtype_are_rounded() -> None:
    memory, own = blocks(torch.bfloat16), factors(["q 0", "q 1"], 3)
    for stack in stacks(own, torch.float32):
        memory.write(dict.fromkeys(WIDTHS, (0, 1, 2)), stack)
    assert torch.equal(memory.of["q 1"][:3], own["q 1"].bfloat16())


def test_neighbours_are_a_slice() -> None:
    assert place((5, 6, 7), CPU) == slice(5, 8)
    listed = place([5, 7, 6], CPU)
    assert isinstance(listed, Tensor)
    assert listed.tolist() == [5, 7, 6]
