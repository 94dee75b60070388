"""paged_attention: against torch's own attention on dense float64 keys and values, sequence by sequence."""

import sys
import threading
import time
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.kernels import AttentionPlan, AttentionRow, paged_attention, reference, store_kv
from chorus.kernels.attention_plan import FEW_KEYS
from chorus.kernels.native.amx_tile import cpu_has_tiles
from chorus.kernels.native.decode_attention import few_keys
from chorus.kernels.native.vectors import cpu_has
from support.attention import batch, check

CPU = torch.device("cpu")
FEW_KEYS_OF = "chorus.kernels.native.decode_attention.few_keys"
TILED_FROM = "chorus.kernels.native.prompt_attention.tiled_from"
BLOCK = 4
BF16 = torch.bfloat16


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, cap: float | None
) -> torch.Tensor:
    """q [n, H, D] are the last n of k, v [L, H_kv, D]; in float64."""
    n, heads, _ = q.shape
    length = k.shape[0]
    k, v = (t.double().repeat_interleave(heads // t.shape[1], dim=1).transpose(0, 1) for t in (k, v))
    position = torch.arange(length)
    last = torch.arange(length - n, length)[:, None]
    visible = position <= last
    if window is not None:
        visible &= position > last - window
    q = q.double().transpose(0, 1)
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale).transpose(0, 1)
    scores = torch.tanh(q @ k.transpose(1, 2) * scale / cap) * cap
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v).transpose(0, 1)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 21)), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    window=st.sampled_from([None, 1, 5]),
    cap=st.sampled_from([None, 2.0]),
    specification=st.booleans(),
    short=st.booleans(),
    spare=st.integers(1, 12),
    seed=st.integers(0, 999),
)
def test_packed_paged_attention_equals_dense_attention_per_sequence(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    window: int | None,
    cap: float | None,
    specification: bool,
    short: bool,
    spare: int,
    seed: int,
) -> None:
    """Decodes (1 new token) and chunks over a prefix of any length, in one pack, pages scattered and reused unclean.

    Chunks are computed as so many decodes where they are `short`.
    """
    generator = torch.Generator().manual_seed(seed)
    h, h_kv, d = *heads, 8
    blocks_needed = sum(-(-(new + old) // BLOCK) for new, old in lengths)
    k_cache = torch.randn(blocks_needed + spare, h_kv, BLOCK, d, generator=generator)
    v_cache = torch.randn(blocks_needed + spare, h_kv, BLOCK, d, generator=generator)
    free = torch.randperm(blocks_needed + spare, generator=generator).tolist()
    rows, olds, keys, values = [], [], [], []
    start = 0
    for new, old in lengths:
        table = [free.pop() for _ in range(-(-(new + old) // BLOCK))]
        rows.append(AttentionRow(start, start + new, new + old, table))
        keys.append(torch.randn(new + old, h_kv, d, generator=generator))
        values.append(torch.randn(new + old, h_kv, d, generator=generator))
        olds.append(AttentionRow(0, old, old, table))
        start += new
    for row, k, v in zip(olds, keys, values, strict=True):
        if row.context:
            store_kv(k[: row.end], v[: row.end], k_cache, v_cache, AttentionPlan([row], BLOCK, CPU).slots)
    query = torch.randn(start, h, d, generator=generator)
    plan = AttentionPlan(rows, BLOCK, CPU)
    new_k = torch.cat([k[row.end :] for row, k in zip(olds, keys, strict=True)])
    new_v = torch.cat([v[row.end :] for row, v in zip(olds, values, strict=True)])
    store_kv(new_k, new_v, k_cache, v_cache, plan.slots)
    if specification:
        got = reference.paged_attention(query, k_cache, v_cache, rows, scale=0.3, window=window, soft_cap=cap)
    else:
        with patch(FEW_KEYS_OF, return_value=FEW_KEYS if short else 0):
            got = paged_attention(query, k_cache, v_cache, plan, scale=0.3, window=window, soft_cap=cap)
    for row, k, v in zip(rows, keys, values, strict=True):
        expected = dense(query[row.start : row.end], k, v, 0.3, window, cap)
        torch.testing.assert_close(got[row.start : row.end].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("block", "scattered"), [(16, False), (32, True)])
def test_decodes_in_bfloat16_stay_within_the_bound(block: int, scattered: bool) -> None:
    """RMS of the error within 4e-3 of the output's, against float64; rows from one token to a thousand, one pack."""
    generator = torch.Generator().manual_seed(block)
    contexts = [1, 33, 500, 1024]
    h, h_kv, d = 8, 2, 64
    blocks = sum(-(-context // block) for context in contexts) * (4 if scattered else 1)
    caches = [torch.randn(blocks, h_kv, block, d, generator=generator).bfloat16() for _ in range(2)]
    free = torch.randperm(blocks, generator=generator).tolist() if scattered else list(range(blocks))
    tables = [[free.pop() for _ in range(-(-context // block))] for context in contexts]
    rows = [AttentionRow(i, i + 1, context, tables[i]) for i, context in enumerate(contexts)]
    query = torch.randn(len(rows), h, d, generator=generator).bfloat16() * 1.5
    plan = AttentionPlan(rows, block, CPU)
    got, again = (paged_attention(query, caches[0], caches[1], plan, scale=d**-0.5).double() for _ in range(2))
    exact = reference.paged_attention(query.double(), caches[0].double(), caches[1].double(), rows, scale=d**-0.5)
    assert (got - exact).square().mean().sqrt() <= 4e-3 * exact.square().mean().sqrt()
    assert (got - exact).abs().max() <= 2e-2 * exact.abs().max()
    assert torch.equal(got, again)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 1), (5, 1), (14, 2), (24, 4)])
@pytest.mark.parametrize("dim", [16, 48, 64, 80, 128, 256])
def test_all_tokens_of_chunks_in_bfloat16_stay_within_the_bound(heads: tuple[int, int], dim: int) -> None:
    """Token by token, however many queries share a key and a tile of sums holds, in pages that are not full."""
    query, k_cache, v_cache, rows = batch([(70, 0), (1, 0), (5, 27), (1, 47), (1, 48), (16, 16)], heads, dim, BF16, 1)
    for window, bias in [(None, None), (21, None), (None, torch.randn(heads[0], 2 * 9 + 1))]:
        options: dict[str, Any] = {"scale": dim**-0.5, "window": window, "bias": bias}
        with patch(FEW_KEYS_OF, return_value=FEW_KEYS), patch(TILED_FROM, return_value=None):
            got = paged_attention(query, k_cache, v_cache, AttentionPlan(rows, 16, CPU), **options)
        exact = reference.paged_attention(query.double(), k_cache.double(), v_cache.double(), rows, **options)
        check(got, exact, BF16)


def test_what_lies_in_a_page_past_the_context_is_not_seen() -> None:
    """Of a page that somebody else has left full of the largest numbers there are; a second row has NaN for a query."""
    query, k_cache, v_cache, rows = batch([(1, 20), (1, 3), (1, 9)], (4, 2), 64, BF16, 5)
    plan = AttentionPlan(rows, 16, CPU)
    clean = paged_attention(query, k_cache, v_cache, plan, scale=0.1)
    for row in rows:
        page, first = row.blocks[row.context // 16], row.context % 16
        k_cache[page, :, first:] = v_cache[page, :, first:] = reference.KV_LIMIT
    query[1] = float("nan")
    got = paged_attention(query, k_cache, v_cache, plan, scale=0.1)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].isnan().all()


@pytest.mark.parametrize(("heads", "bad"), [(4, 1), (5, 4)])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_a_heads_nan_reaches_no_other_head_of_its_group(heads: int, bad: int, dtype: torch.dtype) -> None:
    """Among the scores that are compared as vectors, and in the rest."""
    query, k_cache, v_cache, rows = batch([(1, 52), (1, 3)], (heads, 1), 64, dtype, 6)
    plan, others = AttentionPlan(rows, 16, CPU), [head for head in range(heads) if head != bad]
    clean = paged_attention(query, k_cache, v_cache, plan, scale=0.1)
    query[:, bad] = torch.nan
    got = paged_attention(query, k_cache, v_cache, plan, scale=0.1)
    assert torch.equal(got[:, others], clean[:, others])
    assert got[:, bad].isnan().all()


def test_chunks_are_computed_as_decodes_where_that_is_faster() -> None:
    """Always where a CPU without AMX multiplies bfloat16 and four queries share a key head; the rest has its bounds."""
    cache, query = torch.empty(1, 2, 16, 64), torch.empty(1, 8, 64)
    in_tiles = few_keys(query.bfloat16(), cache.bfloat16(), capped=False)
    assert (in_tiles == sys.maxsize) == (cpu_has("avx512bf16") and not cpu_has_tiles())
    assert FEW_KEYS <= few_keys(query[:, :2].bfloat16(), cache.bfloat16(), capped=False) <= in_tiles
    assert few_keys(query, cache, capped=False) == FEW_KEYS
    assert few_keys(query.bfloat16(), cache.bfloat16(), capped=True) == FEW_KEYS


def test_heads_whose_numbers_lie_apart_and_caches_that_differ_are_refused() -> None:
    query, k_cache, v_cache, rows = batch([(20, 0), (1, 3)], (4, 2), 64, BF16, 2)
    plan = AttentionPlan(rows, 16, CPU)
    apart = query.transpose(1, 2).contiguous().transpose(1, 2)
    view = v_cache.transpose(1, 2).contiguous().transpose(1, 2)
    for asked, values in [(apart, v_cache), (query, view)]:
        with pytest.raises(ValueError, match="side by side and equal strides"):
            paged_attention(asked, k_cache, values, plan, scale=0.1)


def test_a_chunk_is_as_long_as_the_keys_that_it_sees() -> None:
    rows = [AttentionRow(0, 8, 40, list(range(10)))]
    assert AttentionPlan(rows, BLOCK, CPU).on_cpu(8 * 40, None).prefills == []
    assert AttentionPlan(rows, BLOCK, CPU).on_cpu(8 * 40 - 1, None).prefills == rows
    assert AttentionPlan(rows, BLOCK, CPU).on_cpu(8 * 39, 39).prefills == []
    assert AttentionPlan(rows, BLOCK, CPU).on_cpu(8 * 39, 41).prefills == rows


@pytest.mark.parametrize("tiled", [None, 4] if cpu_has("avx512bf16") else [None])
def test_a_long_prompts_attention_lets_other_threads_have_the_interpreter(tiled: int | None) -> None:
    query, k_cache, v_cache, rows = batch([(1400, 0)], (4, 2), 64, BF16, 3)
    plan, ticks, ended = AttentionPlan(rows, 16, CPU), [time.monotonic()], threading.Event()

    def tick() -> None:
        while not ended.wait(2e-4):
            ticks.append(time.monotonic())

    ticker = threading.Thread(target=tick)
    with patch(FEW_KEYS_OF, return_value=sys.maxsize), patch(TILED_FROM, return_value=tiled):
        paged_attention(query, k_cache, v_cache, plan, scale=0.1)  # compiled
        ticker.start()
        began = time.monotonic()
        for _ in range(5):
            paged_attention(query, k_cache, v_cache, plan, scale=0.1)
        took = (time.monotonic() - began) / 5
    ended.set()
    ticker.join()
    within_calls = sum(now - before < took / 2 for before, now in pairwise(ticks))
    assert within_calls > 20  # some 40 a call; where the lock is kept one between two calls


def test_rows_that_share_pages_read_the_same() -> None:
    """As outputs of one request do, which differ in their last page only."""
    k_cache, v_cache = torch.randn(5, 1, BLOCK, 8), torch.randn(5, 1, BLOCK, 8)
    rows = [AttentionRow(0, 1, 10, [3, 1, 0]), AttentionRow(1, 2, 11, [3, 1, 4]), AttentionRow(2, 3, 8, [3, 1])]
    query = torch.randn(3, 2, 8)
    expected = reference.paged_attention(query, k_cache, v_cache, rows, scale=0.5)
    got = paged_attention(query, k_cache, v_cache, AttentionPlan(rows, BLOCK, CPU), scale=0.5)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_store_kv_equals_its_specification_and_stores_nothing_that_overflows(dtype: torch.dtype) -> None:
    key, value = torch.randn(3, 2, 4).to(dtype), torch.randn(3, 2, 4).to(dtype)
    key[1, 0, 0], value[2, 1, 3], key[2, 0, 1], value[0, 0, 0] = float("nan"), float("inf"), 3e38, -3e38
    slots = torch.tensor([9, 0, 6])
    caches = [(torch.zeros(3, 2, BLOCK, 4, dtype=dtype), torch.zeros(3, 2, BLOCK, 4, dtype=dtype)) for _ in range(2)]
    store_kv(key, value, *caches[0], slots)
    reference.store_kv(key, value, *caches[1], slots)
    for fast, spec in zip(*caches, strict=True):
        assert fast.abs().max() <= reference.KV_LIMIT
        assert torch.equal(fast, spec)
    assert torch.equal(caches[0][0][2, :, 1], key[0])


@pytest.mark.parametrize("huge", [float("nan"), float("inf"), 3e38, -3e38])
def test_keys_and_values_of_one_sequence_reach_no_other(huge: float) -> None:
    """Neither through the page that pads a shorter table, nor through what a page's last owner left in it."""
    caches = torch.zeros(4, 1, BLOCK, 8), torch.zeros(4, 1, BLOCK, 8)
    poison = torch.full((2 * BLOCK, 1, 8), huge)
    store_kv(poison, poison, *caches, torch.arange(2 * BLOCK))  # pages 0 and 1
    rows = [AttentionRow(0, 1, 3, [1]), AttentionRow(1, 2, 2 * BLOCK, [2, 3])]
    new, query = torch.randn(2, 1, 8), torch.randn(2, 2, 8)
    outputs = []
    for left_behind in (caches, (torch.zeros_like(caches[0]), torch.zeros_like(caches[1]))):
        for cache in left_behind:
            cache[1, :, :3] = 1.0
        plan = AttentionPlan(rows, BLOCK, CPU)
        store_kv(new, new, *left_behind, plan.slots)
        outputs.append(paged_attention(query, *left_behind, plan, scale=1.0))
    assert outputs[0].isfinite().all()
    assert torch.equal(*outputs)


def test_a_query_with_nan_reaches_no_other_sequence() -> None:
    k_cache, v_cache = torch.randn(4, 1, BLOCK, 8), torch.randn(4, 1, BLOCK, 8)
    plan = AttentionPlan([AttentionRow(0, 1, 3, [1]), AttentionRow(1, 2, 2, [2])], BLOCK, CPU)
    query = torch.randn(2, 2, 8)
    clean = paged_attention(query, k_cache, v_cache, plan, scale=1.0)
    query[0] = float("nan")
    assert torch.equal(paged_attention(query, k_cache, v_cache, plan, scale=1.0)[1], clean[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("cap", "biased"), [(5.0, False), (None, True), (2.0, True)])
@pytest.mark.parametrize("few_keys", [0, FEW_KEYS])
def test_a_chunk_is_the_same_in_pieces(dtype: torch.dtype, cap: float | None, biased: bool, few_keys: int) -> None:
    """A chunk over a prefix with a cap or a bias, few queries at a time or one, against the float64 specification."""
    query, k_cache, v_cache, rows = batch([(37, 20), (1, 9)], (4, 2), 16, dtype, 3)
    options: dict[str, Any] = {"scale": 0.3, "window": 30, "soft_cap": cap}
    options["bias"] = torch.randn(4, 2 * 7 + 1) if biased else None
    pieces = patch("chorus.kernels.dense_attention.PIECE", 4 * 57 * 5)
    with pieces, patch(FEW_KEYS_OF, return_value=few_keys):
        got = paged_attention(query, k_cache, v_cache, AttentionPlan(rows, 16, CPU), **options)
    exact = reference.paged_attention(query.double(), k_cache.double(), v_cache.double(), rows, **options)
    check(got, exact, torch.bfloat16 if dtype is torch.bfloat16 else torch.float32)


def test_each_token_as_a_row_of_its_own_sees_what_it_sees_in_its_chunk() -> None:
    query, k_cache, v_cache, rows = batch([(37, 20), (0, 9), (5, 1)], (4, 2), 16, torch.float64, 3)
    tokens = [token for row in rows for token in row.each_token()]
    assert [(token.start, token.end) for token in tokens] == [(i, i + 1) for i in range(len(query))]
    got, expected = (
        reference.paged_attention(query, k_cache, v_cache, some, scale=0.3, window=30) for some in (tokens, rows)
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


ROW = AttentionRow(0, 2, 3, [1])


@pytest.mark.parametrize(
    ("said", "rows"),
    [
        ("ones before end at 0", [AttentionRow(1, 2, 1, [0])]),
        ("ones before end at 2", [ROW, AttentionRow(3, 4, 1, [0])]),
        ("ones before end at 2", [ROW, AttentionRow(2, 2, 1, [0])]),
        ("does not hold 2 new tokens", [AttentionRow(0, 2, 1, [0])]),
        ("do not hold a context of 9", [AttentionRow(0, 1, 9, [0, 1])]),
        ("block -1", [AttentionRow(0, 1, 5, [0, -1])]),
    ],
)
def test_rows_that_make_no_batch_are_refused(said: str, rows: list[AttentionRow]) -> None:
    with pytest.raises(ValueError, match=f"rows: .*{said}"):
        AttentionPlan(rows, BLOCK, CPU)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("query: want", {"query": torch.zeros(3, 2, 4)}),
        ("query: want", {"query": torch.zeros(2, 2, 4, dtype=torch.int32)}),
        ("query: .* does not fit", {"query": torch.zeros(2, 3, 4)}),
        ("query: .* does not fit", {"query": torch.zeros(2, 2, 8)}),
        ("v_cache", {"v_cache": torch.zeros(2, 1, BLOCK, 4)}),
        ("k_cache: torch.float16", {"k_cache": torch.zeros(2, 2, BLOCK, 4, dtype=torch.float16)}),
        ("v_cache: .* on meta", {"v_cache": torch.zeros(2, 2, BLOCK, 4, device="meta")}),
        ("k_cache: want", dict.fromkeys(("k_cache", "v_cache"), torch.zeros(2, 2, BLOCK + 1, 4))),
        ("rows: block 1 ", dict.fromkeys(("k_cache", "v_cache"), torch.zeros(1, 2, BLOCK, 4))),
        ("window", {"window": 0}),
        ("soft_cap", {"soft_cap": -1.0}),
        ("bias", {"bias": torch.zeros(2, 4)}),
        ("bias: tokens have no position", {"bias": torch.zeros(2, 5), "causal": False}),
        ("window: tokens have no position", {"window": 3, "causal": False}),
    ],
)
def test_what_does_not_fit_a_plan_is_refused_by_name(said: str, change: dict[str, Any]) -> None:
    fitting = {name: torch.zeros(2, 2, BLOCK, 4) for name in ("k_cache", "v_cache")}
    arguments: dict[str, Any] = {"query": torch.zeros(2, 2, 4), "scale": 1.0, **fitting, **change}
    plan = AttentionPlan([ROW], BLOCK, CPU, causal=arguments.pop("causal", True))
    with pytest.raises(ValueError, match=said):
        paged_attention(plan=plan, **arguments)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("key: want", {"key": torch.zeros(3, 2, 4)}),
        ("value: want", {"value": torch.zeros(2, 1, 4)}),
        ("key: torch.float16", {"key": torch.zeros(2, 2, 4, dtype=torch.float16)}),
        ("v_cache", {"v_cache": torch.zeros(2, 2, BLOCK, 5)}),
        ("slots: want", {"slots": torch.zeros(2, dtype=torch.int32)}),
        ("slots: -1 to 0", {"slots": torch.tensor([0, -1])}),
        ("slots: 0 to 8", {"slots": torch.tensor([0, 2 * BLOCK])}),
    ],
)
def test_what_can_not_be_stored_is_refused_by_name(said: str, change: dict[str, torch.Tensor]) -> None:
    fitting: dict[str, Any] = {name: torch.zeros(2, 2, BLOCK, 4) for name in ("k_cache", "v_cache")}
    fitting |= {name: torch.zeros(2, 2, 4) for name in ("key", "value")}
    with pytest.raises(ValueError, match=said):
        store_kv(**fitting | {"slots": torch.tensor([0, 1])} | change)
