"""Adapters' host memory: copies are exact, together, and gone with their last tensor."""

import psutil
import pytest
import torch

from chorus.adapters.host_memory import copies


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
