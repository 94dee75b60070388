"""store_kv and paged_attention on Triton, in the interpreter, against dense float64 attention, sequence by sequence."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chorus.kernels import AttentionPlan, AttentionRow, PackedPlan, packed_attention, paged_attention, reference
from chorus.kernels.attention_launch import paged_attention_op, store_kv_op
from chorus.kernels.attention_tables import Capacity
from support.attention import BLOCK, batch, check

CPU = torch.device("cpu")


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.sampled_from([1, 1, 2, 17, 40]), st.integers(0, 70)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3)]),
    dim=st.sampled_from([8, 16, 24, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    window=st.sampled_from([None, 1, 20]),
    cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 99),
)
@example([(1, 1100), (1, 0), (1, 511), (1, 512)], (4, 2), 16, torch.float32, None, None, 1)
@example([(1, 1100), (1, 600)], (2, 1), 16, torch.bfloat16, 600, 2.0, 2)
def test_mixed_batch_equals_dense_attention(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    window: int | None,
    cap: float | None,
    seed: int,
) -> None:
    """Decodes, some over contexts that are cut, and chunks over prefixes; the same bits again."""
    query, k_cache, v_cache, rows = batch(lengths, heads, dim, dtype, seed)
    plan = AttentionPlan(rows, BLOCK, CPU, triton=True)
    options: dict[str, Any] = {"scale": dim**-0.5, "window": window, "soft_cap": cap}
    got, again = (paged_attention(query, k_cache, v_cache, plan, **options) for _ in range(2))
    exact = reference.paged_attention(query.double(), k_cache.double(), v_cache.double(), rows, **options)
    check(got, exact, dtype)
    assert torch.equal(got, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_bias_by_distance_is_added_where_tokens_stand(dtype: torch.dtype, cap: float | None) -> None:
    """A decode whose context is cut, a short one, a chunk over a prefix; contexts beyond the bias's distances."""
    query, k_cache, v_cache, rows = batch([(1, 700), (1, 3), (30, 25)], (6, 2), 24, dtype, 7)
    options: dict[str, Any] = {"scale": 0.2, "soft_cap": cap, "bias": torch.randn(6, 2 * 20 + 1)}
    got = paged_attention(query, k_cache, v_cache, AttentionPlan(rows, BLOCK, CPU, triton=True), **options)
    exact = reference.paged_attention(query.double(), k_cache.double(), v_cache.double(), rows, **options)
    check(got, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_attention_sees_all_of_another_context(dtype: torch.dtype) -> None:
    """A single token over a context that is cut, and more tokens than there are keys."""
    query, k_cache, v_cache, rows = batch([(1, 700), (40, 30)], (4, 2), 16, dtype, 8)
    rows = [rows[0], AttentionRow(1, 41, 21, rows[1].blocks)]
    plan = AttentionPlan(rows, BLOCK, CPU, causal=False, triton=True)
    got = paged_attention(query, k_cache, v_cache, plan, scale=0.25)
    exact = reference.paged_attention(
        query.double(), k_cache.double(), v_cache.double(), rows, scale=0.25, causal=False
    )
    check(got, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 16), ((3, 3), 24)])
def test_a_pack_attends_sequence_by_sequence(
    dtype: torch.dtype, biased: bool, heads: tuple[int, int], dim: int
) -> None:
    """Sequences of 1 token, of a tile and of several; the same with tables of a capacity, and the same bits again."""
    lengths = [1, 70, 16, 33]
    query, key, value = (torch.randn(sum(lengths), h, dim).to(dtype) for h in (heads[0], heads[1], heads[1]))
    bias = torch.randn(heads[0], 2 * 9 + 1) if biased else None
    capacity = Capacity(decode_items=3, prefill_items=40, merges=0, parts=0, pages=200)
    plans = [PackedPlan(lengths, CPU, c, triton=True) for c in (None, None, capacity)]
    got, again, roomy = (packed_attention(query, key, value, plan, scale=0.25, bias=bias) for plan in plans)
    exact = reference.packed_attention(query.double(), key.double(), value.double(), lengths, scale=0.25, bias=bias)
    check(got, exact, dtype)
    assert torch.equal(got, again)
    assert torch.equal(got, roomy)


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    lengths = [(1, 700), (1, 30), (20, 5)]
    query, k_cache, v_cache, rows = batch(lengths, (4, 2), 16, torch.float32, 3)
    together = paged_attention(query, k_cache, v_cache, AttentionPlan(rows, BLOCK, CPU, triton=True), scale=0.25)
    for row in rows:
        count = row.end - row.start
        alone = AttentionPlan([AttentionRow(0, count, row.context, row.blocks)], BLOCK, CPU, triton=True)
        part = query[row.start : row.end].contiguous()
        assert torch.equal(paged_attention(part, k_cache, v_cache, alone, scale=0.25), together[row.start : row.end])


def test_tables_of_a_capacity_have_one_size_and_give_the_same() -> None:
    capacity = Capacity(decode_items=8, prefill_items=3, merges=2, parts=6, pages=100)
    sizes = set()
    for lengths in ([(1, 700), (1, 30), (20, 5)], [(1, 3)], [(1, 1000), (1, 520), (1, 0)]):
        query, k_cache, v_cache, rows = batch(lengths, (4, 2), 16, torch.float32, 4)
        plans = [AttentionPlan(rows, BLOCK, CPU, c, triton=True) for c in (None, capacity)]
        exactly, roomy = (paged_attention(query, k_cache, v_cache, plan, scale=0.25) for plan in plans)
        assert torch.equal(exactly, roomy)
        tables = plans[1].tables(2, None)
        sizes.add((tables.tables.shape, tables.geometry))
    assert len(sizes) == 1
    with pytest.raises(ValueError, match="capacity is 8"):
        AttentionPlan(batch([(1, 0)] * 9, (1, 1), 8, torch.float32, 0)[3], BLOCK, CPU, capacity, triton=True).tables(
            1, None
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads_first", [False, True])
def test_store_kv_equals_its_specification(dtype: torch.dtype, heads_first: bool) -> None:
    """Also from keys as rotary embeddings leave them, heads before rows; nothing that overflows is kept."""
    key, value = torch.randn(5, 3, 24).to(dtype), torch.randn(5, 3, 24).to(dtype)
    key[1, 0, 0], value[2, 1, 3], key[2, 0, 1], value[0, 0, 0] = float("nan"), float("inf"), 3e38, -3e38
    if heads_first:
        key, value = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (key, value))
    slots = torch.tensor([9, 0, 33, 47, 16])
    caches = [(torch.ones(3, 3, BLOCK, 24, dtype=dtype), torch.ones(3, 3, BLOCK, 24, dtype=dtype)) for _ in range(2)]
    store_kv_op(key, value, *caches[0], slots)
    reference.store_kv(key, value, *caches[1], slots)
    for fast, spec in zip(*caches, strict=True):
        assert torch.equal(fast, spec)


def test_the_ops_are_what_torch_expects_of_ops() -> None:
    query, k_cache, v_cache, rows = batch([(1, 20), (3, 4)], (4, 2), 16, torch.float32, 5)
    plan = AttentionPlan(rows, BLOCK, CPU, triton=True)
    tables, geometry = plan.tables(2, None)
    torch.library.opcheck(paged_attention_op, (query, k_cache, v_cache, tables, geometry, 0.25, 0, 0.0))
    bias = torch.randn(4, 9)
    torch.library.opcheck(paged_attention_op, (query, k_cache, v_cache, tables, geometry, 0.25, 0, 0.0, bias, True))
    key, value = torch.randn(4, 2, 16), torch.randn(4, 2, 16)
    torch.library.opcheck(store_kv_op, (key, value, k_cache, v_cache, plan.slots))


@pytest.mark.parametrize("name", ["query", "k_cache", "v_cache"])
def test_what_the_kernels_can_not_read_is_refused_by_name(name: str) -> None:
    query, k_cache, v_cache, rows = batch([(1, 20)], (4, 2), 16, torch.float32, 6)
    given_: dict[str, Any] = {"query": query, "k_cache": k_cache, "v_cache": v_cache}
    given_[name] = given_[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(ValueError, match=name):
        paged_attention(**given_, plan=AttentionPlan(rows, BLOCK, CPU, triton=True), scale=1.0)
