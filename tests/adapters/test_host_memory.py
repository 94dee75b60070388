"""Adapters' host memory: copies are exact, together, and gone with their last tensor."""

import psutil
import pytest
import torch

from chorus.adapters.host_memory import copies, stacked


def test_copies_are_the_tensors_in_their_order_and_contiguous() -> None:
    tensors = [torch.randn(4, 6), torch.randn(6, 4).mT, torch.randn(3, 5).half(), torch.randn(5, 3).half().mT]
    tensors += [torch.randn(4, 6).bfloat16(), torch.randn(4, 6)]
    for tensor, copy in zip(tensors, copies(tensors), strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
        assert copy.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_copies_in_another_dtype_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    tensors = [torch.randn(7, 9), torch.randn(9, 7).mT, torch.randn(2, 3).bfloat16(), torch.randn(2, 3).half()]
    for tensor, copy in zip(tensors, copies(tensors, dtype), strict=True):
        assert torch.equal(copy, tensor.to(dtype))


def test_copies_share_no_memory_with_each_other() -> None:
    tensors = [torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(1, 1), torch.zeros(5, 3)]
    copied = copies(tensors)
    for i, copy in enumerate(copied):
        copy.fill_(i + 1)
    assert [copy.unique().tolist() for copy in copied] == [[1.0], [2.0], [3.0], [4.0]]


def test_copies_give_their_memory_back_to_the_system() -> None:
    """Of tensors as small as an adapter's: malloc keeps what such were allocated in."""
    process, sources = psutil.Process(), [torch.ones(64, 1024) for _ in range(4)] * 64
    before = process.memory_info().rss
    copied = copies(sources)
    assert process.memory_info().rss - before > 60 << 20
    del copied
    assert process.memory_info().rss - before < 4 << 20


def test_copies_of_one_shape_are_stacked_without_another_copy() -> None:
    tensors = [torch.randn(4, 6), torch.randn(3, 5), torch.randn(4, 6), torch.randn(4, 6)]
    first, _, second, third = copies(tensors)
    together = stacked([first, second, third])
    assert torch.equal(together, torch.stack([tensors[0], *tensors[2:]]))
    assert together.data_ptr() == first.data_ptr()
    assert stacked([second]).data_ptr() == second.data_ptr()


@pytest.mark.parametrize("order", [(1, 0), (0, 2), (0, 0), (2, 1, 0)])
def test_what_does_not_lie_in_line_is_copied_when_stacked(order: tuple[int, ...]) -> None:
    tensors = copies([torch.randn(4, 6) for _ in range(3)])
    chosen = [tensors[i] for i in order]
    together = stacked(chosen)
    assert torch.equal(together, torch.stack(chosen))
    assert together.data_ptr() not in {tensor.data_ptr() for tensor in tensors}


def test_neighbours_of_two_storages_are_not_taken_for_one() -> None:
    memory = bytearray(2 * 4 * 6 * 4)
    halves = [torch.frombuffer(memory, dtype=torch.float32, count=24, offset=96 * i).view(4, 6) for i in range(2)]
    assert halves[1].data_ptr() == halves[0].data_ptr() + 96
    halves[1].fill_(1)
    together = stacked(halves)
    assert together.data_ptr() != halves[0].data_ptr()
    assert together.sum((1, 2)).tolist() == [0, 24]
