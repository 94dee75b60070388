"""Chunks of prompts in tiles: against the float64 specification, within the bound that decodes have."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.kernels import AttentionPlan, AttentionRow, paged_attention, reference
from chorus.kernels.native.amx_tile import cpu_has_tiles
from chorus.kernels.native.prompt_attention import PromptRows, tiled_from
from chorus.kernels.native.vectors import cpu_has
from support.attention import batch, check

pytestmark = pytest.mark.skipif(not cpu_has("avx512bf16"), reason="the kernel is made of products of bfloat16")
CPU, BF16, PAGE = torch.device("cpu"), torch.bfloat16, 16


def attended(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, rows: list[AttentionRow], **options: Any
) -> torch.Tensor:
    """With chunks of two tokens and more in tiles, on any CPU that can."""
    causal, tiled = options.pop("causal", True), options.pop("tiled", 2)
    plan = AttentionPlan(rows, PAGE, CPU, causal=causal)
    with patch("chorus.kernels.native.prompt_attention.tiled_from", return_value=tiled):
        return paged_attention(query, k_cache, v_cache, plan, **options)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 150)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 1), (8, 2), (7, 1)]),
    dim=st.sampled_from([32, 64, 96, 128]),
    window=st.sampled_from([None, 1, 5, 64, 100]),
    cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 999),
)
def test_chunks_in_tiles_stay_within_the_bound(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    window: int | None,
    cap: float | None,
    seed: int,
) -> None:
    """Beside decodes, over a prefix of any length, in pages that are scattered, unclean and not full."""
    query, k_cache, v_cache, rows = batch(lengths, heads, dim, BF16, seed)
    options: dict[str, Any] = {"scale": dim**-0.5, "window": window, "soft_cap": cap}
    got = attended(query, k_cache, v_cache, rows, **options)
    exact = reference.paged_attention(query.double(), k_cache.double(), v_cache.double(), rows, **options)
    seen = torch.tensor([min(token.context, window or token.context) for row in rows for token in row.each_token()])
    for some in (seen < 8, seen >= 8):  # what few keys give is larger, and so is its last rounding
        if some.any():
            check(got[some], exact[some], BF16)


@pytest.mark.parametrize("size", [0.01, 300.0])
def test_scores_of_any_size_are_weighed(size: float) -> None:
    """All alike, and so far apart that a few keys have all the weight; an item has fewer tokens than the chunk."""
    query, k_cache, v_cache, rows = batch([(150, 20), (70, 0)], (8, 2), 64, BF16, 4)
    assert PromptRows(rows, PAGE, 4, causal=True).count == 3 + 2
    query *= size
    got = attended(query, k_cache, v_cache, rows, scale=0.125)
    exact = reference.paged_attention(query.double(), k_cache.double(), v_cache.double(), rows, scale=0.125)
    check(got, exact, BF16)


@pytest.mark.parametrize("tiled", [None, 2])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_the_highest_score_may_be_huge(tiled: int | None, cap: float | None) -> None:
    """Where a rounding of it is larger than any other score: the key that has it still has all the weight."""
    query, k_cache, v_cache, rows = batch([(20, 30)], (4, 2), 64, BF16, 9)
    key = rows[0].blocks[0], slice(None), 3
    query[:], k_cache[key] = query.abs(), 1e12
    got = attended(query, k_cache, v_cache, rows, scale=0.125, soft_cap=cap, tiled=tiled)
    value = v_cache[key].repeat_interleave(2, dim=0)
    if cap is None:
        assert torch.equal(got, value.expand(20, 4, 64))
    exact = reference.paged_attention(
        query.double(), k_cache.double(), v_cache.double(), rows, scale=0.125, soft_cap=cap
    )
    check(got, exact, BF16)


def test_more_query_heads_than_an_item_holds_share_a_key_head() -> None:
    query, k_cache, v_cache, rows = batch([(5, 30), (3, 0)], (260, 1), 32, BF16, 10)
    got = attended(query, k_cache, v_cache, rows, scale=0.2)
    exact = reference.paged_attention(query.double(), k_cache.double(), v_cache.double(), rows, scale=0.2)
    check(got, exact, BF16)


def test_a_chunk_of_another_sequences_keys_sees_all_of_them() -> None:
    query, k_cache, v_cache, rows = batch([(20, 0), (70, 0)], (4, 2), 64, BF16, 5)
    others = [AttentionRow(0, 20, 65, rows[1].blocks), AttentionRow(20, 90, 7, rows[0].blocks)]
    got = attended(query, k_cache, v_cache, others, scale=0.1, causal=False)
    exact = reference.paged_attention(
        query.double(), k_cache.double(), v_cache.double(), others, scale=0.1, causal=False
    )
    check(got, exact, BF16)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_nothing_of_others_is_seen(cap: float | None) -> None:
    """Neither what a page's last owner left past the context nor what is no number in a query, or in a head of it."""
    query, k_cache, v_cache, rows = batch([(21, 6), (9, 0), (40, 60)], (4, 2), 64, BF16, 6)
    clean = attended(query, k_cache, v_cache, rows, scale=0.1, soft_cap=cap)
    for row in rows:
        page, first = row.blocks[row.context // PAGE], row.context % PAGE
        k_cache[page, :, first:] = v_cache[page, :, first:] = reference.KV_LIMIT
    query[3] = query[40, 2] = torch.nan
    got = attended(query, k_cache, v_cache, rows, scale=0.1, soft_cap=cap)
    bad = got.isnan().any(-1)
    assert bad.nonzero().tolist() == [[3, 0], [3, 1], [3, 2], [3, 3], [40, 2]]
    assert torch.equal(got[~bad], clean[~bad])


def test_a_chunk_is_the_same_in_any_batch_and_on_any_number_of_threads() -> None:
    query, k_cache, v_cache, rows = batch([(30, 6), (70, 100)], (4, 2), 64, BF16, 7)
    both = attended(query, k_cache, v_cache, rows, scale=0.1)
    alone = attended(query[30:], k_cache, v_cache, [rows[1]._replace(start=0, end=70)], scale=0.1)
    assert torch.equal(both[30:], alone)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(attended(query, k_cache, v_cache, rows, scale=0.1), both)
    finally:
        torch.set_num_threads(threads)


def test_what_a_tile_does_not_hold_is_left_to_others() -> None:
    """Heads of 80 numbers, pages of 32 tokens, float32; and all with AMX. A few queries do not fill a tile."""
    query, cache = torch.empty(1, 8, 64, dtype=BF16), torch.empty(1, 2, PAGE, 64, dtype=BF16)
    assert tiled_from(query, cache) == (None if cpu_has_tiles() else 4)
    assert tiled_from(query[:, :2], cache) == (None if cpu_has_tiles() else 8)
    assert tiled_from(query.float(), cache.float()) is None
    assert tiled_from(query, torch.empty(1, 2, 32, 64, dtype=BF16)) is None
    assert tiled_from(torch.empty(1, 8, 80, dtype=BF16), torch.empty(1, 2, PAGE, 80, dtype=BF16)) is None


@pytest.mark.parametrize("tiled", [None, 8])
def test_a_batch_falls_into_decodes_tiles_and_others(tiled: int | None) -> None:
    _, _, _, rows = batch([(1, 9), (7, 300), (8, 0), (9, 500)], (4, 4), 64, BF16, 8)
    parts = AttentionPlan(rows, PAGE, CPU).on_cpu(7 * 307 if tiled else 7 * 306, None, 1, tiled)
    assert (parts.decode_rows.count if parts.decode_rows else 0) == (1 + 7 if tiled else 1 + 8)
    assert (parts.prompt_rows.count if parts.prompt_rows else 0) == (2 if tiled else 0)
    assert parts.prefills == ([] if tiled else [rows[1], rows[3]])
