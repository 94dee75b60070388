"""Adapters' host memory: copies are exact, those of one shape together, and gone with their last tensor."""

from collections.abc import Iterable

import psutil
import pytest
import torch
from torch import Tensor

from chorus.adapters.host_memory import stacks
from chorus.adapters.lowered import Stack


def of(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"site {i}": tensor for i, tensor in enumerate(tensors)}


def by_site(made: Iterable[Stack]) -> dict[str, Tensor]:
    return {name: tensor for stack in made for name, tensor in zip(stack.sites, stack.memory, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_copies_are_the_tensors_as_torch_rounds_them(dtype: torch.dtype) -> None:
    tensors = of([torch.randn(4, 6), torch.randn(6, 4).mT, torch.randn(3, 5).half(), torch.randn(5, 3).half().mT])
    tensors |= {"bf16": torch.randn(4, 6).bfloat16(), "again": torch.randn(4, 6), "half": torch.randn(4, 6).half()}
    copied = by_site(stacks(tensors, dtype))
    assert copied.keys() == tensors.keys()
    for name, copy in copied.items():
        assert copy.is_contiguous()
        assert torch.equal(copy, tensors[name].to(dtype))


def test_those_of_one_shape_are_together_in_their_order() -> None:
    made = stacks(of([torch.zeros(3, 5), torch.zeros(5, 3), torch.zeros(3, 5), torch.zeros(1, 1)]), torch.float32)
    assert [(stack.sites, tuple(stack.memory.shape)) for stack in made] == [
        (("site 0", "site 2"), (2, 3, 5)),
        (("site 1",), (1, 5, 3)),
        (("site 3",), (1, 1, 1)),
    ]


def test_copies_share_no_memory_with_each_other() -> None:
    copied = by_site(stacks(of(torch.zeros(*shape) for shape in [(3, 5), (3, 5), (1, 1), (5, 3)]), torch.float32))
    for i, copy in enumerate(copied.values()):
        copy.fill_(i + 1)
    assert [copy.unique().tolist() for copy in copied.values()] == [[1.0], [2.0], [3.0], [4.0]]


def test_copies_give_their_memory_back_to_the_system() -> None:
    """Of tensors as small as an adapter's: malloc keeps what such were allocated in."""
    process, sources = psutil.Process(), of([torch.ones(64, 1024) for _ in range(4)] * 64)
    before = process.memory_info().rss
    copied = stacks(sources, torch.float32)
    assert process.memory_info().rss - before > 60 << 20
    del copied
    assert process.memory_info().rss - before < 4 << 20
