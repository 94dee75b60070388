"""paged_attention: what T5's decoder computes, with its bias by distance and over its encoder's keys."""

import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from chorus.kernels import AttentionPlan, AttentionRow, paged_attention, relative_bias, store_kv

CPU = torch.device("cpu")
BLOCK = 4


def cached(lengths: list[int], heads: int, dim: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Caches full of others' keys, and a scattered table for each sequence."""
    tables = torch.randperm(sum(-(-n // BLOCK) for n in lengths)).split([-(-n // BLOCK) for n in lengths])
    caches = [torch.randn(sum(len(table) for table in tables), heads, BLOCK, dim) for _ in range(2)]
    return caches, [table.tolist() for table in tables]


def test_a_cached_decode_is_what_t5s_decoder_computes_of_the_whole_sequence() -> None:
    """Self-attention with its bias, contexts longer than the bias has distances: chunks first, then single tokens."""
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, num_heads=4, is_decoder=True, relative_attention_num_buckets=8)
    config.relative_attention_max_distance = 20
    module = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    with torch.no_grad():
        module.relative_attention_bias.weight.normal_(std=3.0)
    lengths, chunk = [46, 31], 30
    states = [torch.randn(n, 32) for n in lengths]
    causal = [torch.full((n, n), float("-inf")).triu(1)[None, None] for n in lengths]
    expected = [module(x[None], mask=mask)[0][0] for x, mask in zip(states, causal, strict=True)]
    bias = relative_bias(module.relative_attention_bias.weight.detach(), max_distance=20, bidirectional=False)
    caches, tables = cached(lengths, 4, 8)
    for first, last in [(0, chunk), (chunk, chunk + 1)]:
        parts = torch.cat([x[first:last] for x in states])
        count = last - first
        rows = [AttentionRow(i * count, (i + 1) * count, last, table) for i, table in enumerate(tables)]
        plan = AttentionPlan(rows, BLOCK, CPU)
        q, k, v = (layer(parts).detach().view(-1, 4, 8) for layer in (module.q, module.k, module.v))
        store_kv(k, v, caches[0], caches[1], plan.slots)
        got = module.o(paged_attention(q, caches[0], caches[1], plan, scale=1.0, bias=bias).flatten(1))
        want = torch.cat([whole[first:last] for whole in expected])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_cross_attention_over_cached_keys_is_what_t5_computes() -> None:
    """One new token of a row, several of another, more than the other sequence has."""
    torch.manual_seed(1)
    config = T5Config(d_model=32, d_kv=8, num_heads=4, is_decoder=True)
    module = T5Attention(config, layer_idx=0).eval()
    lengths, news = [13, 3], [1, 6]
    encoded, states = [torch.randn(n, 32) for n in lengths], [torch.randn(n, 32) for n in news]
    expected = [module(x[None], key_value_states=e[None])[0][0] for x, e in zip(states, encoded, strict=True)]
    caches, tables = cached(lengths, 4, 8)
    rows = [AttentionRow(0, 13, 13, tables[0]), AttentionRow(13, 16, 3, tables[1])]
    k, v = (layer(torch.cat(encoded)).detach().view(-1, 4, 8) for layer in (module.k, module.v))
    store_kv(k, v, caches[0], caches[1], AttentionPlan(rows, BLOCK, CPU).slots)
    rows = [AttentionRow(0, 1, 13, tables[0]), AttentionRow(1, 7, 3, tables[1])]
    plan = AttentionPlan(rows, BLOCK, CPU, causal=False)
    query = module.q(torch.cat(states)).detach().view(-1, 4, 8)
    got = module.o(paged_attention(query, caches[0], caches[1], plan, scale=1.0).flatten(1))
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-5)
