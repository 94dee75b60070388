"""store_kv and paged_attention on a CUDA device, against dense float64 attention; replayed in a CUDA graph."""

from typing import Any

import pytest
import torch

from chorus.kernels import (
    AttentionPlan,
    AttentionRow,
    PackedPlan,
    packed_attention,
    paged_attention,
    reference,
    store_kv,
)
from chorus.kernels.attention_tables import Capacity
from support.attention import BLOCK, batch, check

CUDA = torch.device("cuda")
MIXED = [(1, 2047), (1, 0), (1, 511), (1, 1100), (100, 33), (17, 0)]

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "dim"), [((32, 8), 128), ((8, 8), 64), ((16, 2), 80), ((8, 1), 256)])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (600, 5.0)])
def test_mixed_batch_equals_dense_attention(
    dtype: torch.dtype, heads: tuple[int, int], dim: int, window: int | None, cap: float | None
) -> None:
    query, k_cache, v_cache, rows = batch(MIXED, heads, dim, dtype, dim)
    options: dict[str, Any] = {"scale": dim**-0.5, "window": window, "soft_cap": cap}
    plan = AttentionPlan(rows, BLOCK, CUDA)
    here = query.cuda(), k_cache.cuda(), v_cache.cuda()
    got, again = (paged_attention(*here, plan, **options) for _ in range(2))
    exact = reference.paged_attention(query.double(), k_cache.double(), v_cache.double(), rows, **options)
    check(got.cpu(), exact, dtype)
    assert torch.equal(got, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_bias_by_distance_is_added_where_tokens_stand(dtype: torch.dtype, dim: int) -> None:
    query, k_cache, v_cache, rows = batch(MIXED, (12, 12), dim, dtype, dim)
    bias = torch.randn(12, 2 * 128 + 1)
    plan = AttentionPlan(rows, BLOCK, CUDA)
    got = paged_attention(query.cuda(), k_cache.cuda(), v_cache.cuda(), plan, scale=0.1, bias=bias.cuda())
    exact = reference.paged_attention(
        query.double(), k_cache.double(), v_cache.double(), rows, scale=0.1, bias=bias.double()
    )
    check(got.cpu(), exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_attention_sees_all_of_another_context(dtype: torch.dtype) -> None:
    query, k_cache, v_cache, rows = batch([(1, 1100), (40, 30)], (8, 8), 64, dtype, 8)
    rows = [rows[0], AttentionRow(1, 41, 21, rows[1].blocks)]
    plan = AttentionPlan(rows, BLOCK, CUDA, causal=False)
    got = paged_attention(query.cuda(), k_cache.cuda(), v_cache.cuda(), plan, scale=0.125)
    exact = reference.paged_attention(
        query.double(), k_cache.double(), v_cache.double(), rows, scale=0.125, causal=False
    )
    check(got.cpu(), exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dim", [32, 64])
def test_a_pack_attends_sequence_by_sequence(dtype: torch.dtype, biased: bool, dim: int) -> None:
    """BERT's 12 heads and T5's bias; sequences from one token to several tiles."""
    lengths = [1, 512, 16, 33, 200]
    query, key, value = (torch.randn(sum(lengths), 12, dim).to(dtype) for _ in range(3))
    bias = torch.randn(12, 2 * 128 + 1) if biased else None
    here = bias.cuda() if bias is not None else None
    plan = PackedPlan(lengths, CUDA)
    got = packed_attention(query.cuda(), key.cuda(), value.cuda(), plan, scale=0.2, bias=here)
    exact = reference.packed_attention(query.double(), key.double(), value.double(), lengths, scale=0.2, bias=bias)
    check(got.cpu(), exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_store_kv_equals_its_specification(dtype: torch.dtype) -> None:
    key, value = (torch.randn(4, 5, 128, device=CUDA).to(dtype).transpose(0, 1) for _ in range(2))
    key[1, 0, 0], value[2, 1, 3] = float("nan"), 3e38
    slots = torch.tensor([9, 0, 33, 47, 16], device=CUDA)
    fast_k, fast_v, spec_k, spec_v = (torch.ones(3, 4, BLOCK, 128, dtype=dtype, device=CUDA) for _ in range(4))
    store_kv(key, value, fast_k, fast_v, slots)
    reference.store_kv(key, value, spec_k, spec_v, slots)
    assert torch.equal(fast_k, spec_k)
    assert torch.equal(fast_v, spec_v)


def test_a_graph_replays_other_batches_of_its_capacity() -> None:
    """Captured over one batch, replayed over another whose tables are written into the same buffer."""
    capacity = Capacity(decode_items=32, prefill_items=16, merges=8, parts=24, pages=400)
    first, second = (batch(lengths, (8, 2), 64, torch.bfloat16, 1) for lengths in (MIXED, [(1, 900)] * 6 + [(115, 9)]))
    query = first[0].cuda()
    k_pages, v_pages = (torch.zeros(400, 2, BLOCK, 64, dtype=query.dtype, device=CUDA) for _ in range(2))
    plan = AttentionPlan(first[3], BLOCK, CUDA, capacity)
    paged_attention(query, k_pages, v_pages, plan, scale=0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(query, k_pages, v_pages, plan, scale=0.125)
    for given, k, v, rows in (first, second):
        assert given.shape == query.shape
        query.copy_(given)
        k_pages[: len(k)].copy_(k)
        v_pages[: len(v)].copy_(v)
        plan.tables(4, None).tables.copy_(AttentionPlan(rows, BLOCK, CUDA, capacity).tables(4, None).tables)
        graph.replay()
        expected = reference.paged_attention(given.double(), k.double(), v.double(), rows, scale=0.125)
        check(out.cpu(), expected, torch.bfloat16)
