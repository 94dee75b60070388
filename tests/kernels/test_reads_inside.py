"""Compiled kernels that work in tiles read nothing past the end of a tensor.

Run as a program, this computes with tensors that end where a page begins that can not be read: an address past the end
is a segmentation fault.
"""

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from itertools import product

import torch

from chorus.kernels import (
    AttentionPlan,
    AttentionRow,
    LowRankPlan,
    LowRankSegment,
    PackedWeight,
    RankPool,
    low_rank,
    paged_attention,
    reference,
)

PAGE = mmap.PAGESIZE
PROT_NONE = 0
BF16 = torch.bfloat16


def test_tiles_read_nothing_past_the_end_of_a_tensor() -> None:
    done = subprocess.run([sys.executable, __file__], check=False, capture_output=True, text=True, timeout=120)
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0, f"ended with {done.returncode} at {last}\n{done.stderr}"
    assert last == "done"


def at_the_end(tensor: torch.Tensor, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A copy, whose last byte is the last one before a page that can not be read."""
    size = tensor.numel() * dtype.itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * PAGE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(PAGE), PROT_NONE) == 0
    assert readable(end - 1)
    assert not readable(end)
    placed = torch.frombuffer(memory, dtype=dtype, count=tensor.numel(), offset=pages * PAGE - size)
    assert placed.data_ptr() + size == end
    return placed.view(tensor.shape).copy_(tensor)


def readable(address: int) -> bool:
    """As the operating system says, which copies a byte from there."""
    reader, writer = os.pipe()
    try:
        os.write(writer, (ctypes.c_char * 1).from_address(address))
    except OSError as error:
        return error.errno != errno.EFAULT
    finally:
        os.close(reader)
        os.close(writer)
    return True


def random(*shape: int) -> torch.Tensor:
    return at_the_end(torch.randn(shape))


def assert_close(got: torch.Tensor, exact: torch.Tensor) -> None:
    assert float((got.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()) <= 4e-3


def linears() -> None:
    for k in (64, 66):
        weight, bias = random(72, k), random(72)
        packed = PackedWeight(weight)
        for rows in (1, 5, 9, 12):
            print(f"linear of {rows} rows, K = {k}", flush=True)
            x, residual = random(rows, k), random(rows, 72)
            product = x.double() @ weight.double().T
            assert_close(packed.linear(x), product)
            assert_close(packed.linear(x, bias, residual), product + bias.double() + residual.double())


def deltas() -> None:
    """The pool's last rows, for one segment up to the batch's last row."""
    for rows, rank, (k, n) in product((1, 3, 5, 9), (3, 8), ((64, 64), (66, 97), (95, 66), (48, 48))):
        print(f"low_rank of {rows} rows, rank {rank}, K = {k}, N = {n}", flush=True)
        y, x, a, b = random(rows, n), random(rows, k), random(10, k), random(10, n)
        scale = at_the_end(torch.rand(10) / k**0.5, torch.float32)
        own = range(10 - rank, 10)
        middle = x.double() @ a[own].double().T * scale[own].double()
        exact = y.double() + middle @ b[own].double()
        plan = LowRankPlan([LowRankSegment(0, rows, tuple(own))], torch.device("cpu"))
        assert_close(low_rank(y, x, RankPool(a, b, scale), plan), exact)


def attention() -> None:
    """Over the cache's last page, of the last key head, up to the batch's last row."""
    for heads, dim, (context, window) in product((1, 3, 5), (16, 48, 80), ((32, None), (21, None), (32, 5))):
        print(f"attention of {heads} heads of {dim} over {context} tokens, window {window}", flush=True)
        query, k_cache, v_cache = random(2, 2 * heads, dim), random(3, 2, 16, dim), random(3, 2, 16, dim)
        rows = [AttentionRow(i, i + 1, context, [0, 2]) for i in range(2)]
        plan = AttentionPlan(rows, 16, torch.device("cpu"))
        got = paged_attention(query, k_cache, v_cache, plan, scale=dim**-0.5, window=window)
        exact = reference.paged_attention(
            query.double(), k_cache.double(), v_cache.double(), rows, scale=dim**-0.5, window=window
        )
        assert_close(got, exact)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode():
        linears()
        deltas()
        attention()
    print("done")
