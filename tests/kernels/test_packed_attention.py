"""packed_attention: against float64 attention of each sequence alone, against BERT's and T5's own attention."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, T5Config
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.t5.modeling_t5 import T5Attention

from chorus.kernels import PackedPlan, packed_attention, reference, relative_bias
from support.attention import check

CPU = torch.device("cpu")


def pack(lengths: list[int], heads: tuple[int, int], dim: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(lengths), h, dim, generator=generator) for h in (heads[0], heads[1], heads[1])]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    biased=st.booleans(),
    specification=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_sequence_attends_to_itself_alone(
    lengths: list[int], heads: tuple[int, int], dtype: torch.dtype, biased: bool, specification: bool, seed: int
) -> None:
    q, k, v = (t.to(dtype) for t in pack(lengths, heads, 16, seed))
    bias = torch.randn(heads[0], 2 * 6 + 1) if biased else None
    options: dict[str, Any] = {"scale": 0.25, "bias": bias}
    if specification:
        got = reference.packed_attention(q.double(), k.double(), v.double(), lengths, **options)
    else:
        got = packed_attention(q, k, v, PackedPlan(lengths, CPU), **options)
    parts = zip(*(t.double().split(lengths) for t in (q, k, v)), strict=True)
    expected = torch.cat([dense(q, k, v, bias) for q, k, v in parts])
    check(got, expected, dtype if dtype in (torch.float16, torch.bfloat16) and not specification else torch.float32)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """One sequence in float64: [n, H, D]."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1).transpose(0, 1) for t in (k, v))
    mask = torch.zeros(q.shape[1], len(q), len(q), dtype=torch.float64)
    if bias is not None:
        for i in range(len(q)):
            for j in range(len(q)):
                mask[:, i, j] = bias[:, max(min(j - i, 6), -6) + 6]
    return F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=mask, scale=0.25).transpose(0, 1)


def test_a_pack_is_what_bert_computes_of_padded_sequences_with_a_mask() -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_attention_heads=4)
    config._attn_implementation = "eager"
    module = BertSelfAttention(config).eval()
    lengths = [3, 11, 7, 8, 1]
    states = torch.randn(len(lengths), max(lengths), 32)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = torch.zeros(real.shape).masked_fill(~real, float("-inf"))[:, None, None, :]
    expected = module(states, attention_mask=mask)[0][real]  # [T, hidden]
    q, k, v = (layer(states[real]).view(-1, 4, 8) for layer in (module.query, module.key, module.value))
    got = packed_attention(q, k, v, PackedPlan(lengths, CPU), scale=8**-0.5)
    torch.testing.assert_close(got.flatten(1), expected, rtol=1e-5, atol=1e-5)


def test_a_pack_is_what_t5s_encoder_computes_of_each_sequence() -> None:
    """Sequences longer than the bias has distances."""
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, num_heads=4, relative_attention_num_buckets=8)
    config.relative_attention_max_distance = 20
    module = T5Attention(config, has_relative_attention_bias=True).eval()
    with torch.no_grad():
        module.relative_attention_bias.weight.normal_(std=3.0)
    lengths = [50, 3, 46]
    states = torch.randn(sum(lengths), 32)
    expected = torch.cat([module(part[None])[0][0] for part in states.split(lengths)])
    q, k, v = (layer(states).view(-1, 4, 8) for layer in (module.q, module.k, module.v))
    bias = relative_bias(module.relative_attention_bias.weight.detach(), max_distance=20, bidirectional=True)
    got = packed_attention(q, k, v, PackedPlan(lengths, CPU), scale=1.0, bias=bias)
    torch.testing.assert_close(module.o(got.flatten(1)), expected, rtol=1e-4, atol=1e-5)


def test_a_nan_stays_in_its_sequence() -> None:
    lengths = [5, 6, 5]
    q, k, v = pack(lengths, (2, 2), 8, 1)
    clean = packed_attention(q, k, v, PackedPlan(lengths, CPU), scale=1.0)
    k[5], v[6] = float("nan"), float("inf")
    got = packed_attention(q, k, v, PackedPlan(lengths, CPU), scale=1.0)
    assert torch.equal(got[:5], clean[:5])
    assert torch.equal(got[11:], clean[11:])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lengths", {"lengths": [3, 0]}),
        ("query", {"query": torch.zeros(5, 2, 8)}),
        ("query", {"query": torch.zeros(6, 3, 8)}),
        ("query", {"query": torch.zeros(6, 2, 4)}),
        ("key", {"key": torch.zeros(7, 2, 8)}),
        ("value", {"value": torch.zeros(6, 1, 8)}),
        ("key", {"key": torch.zeros(6, 2, 8, dtype=torch.float16)}),
        ("bias", {"bias": torch.zeros(2, 4)}),
        ("bias", {"bias": torch.zeros(3, 5)}),
        ("bias", {"bias": torch.zeros(2, 5, dtype=torch.float64)}),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, change: dict[str, Any]) -> None:
    fitting: dict[str, Any] = {"lengths": [2, 4], "bias": None}
    fitting |= {name: torch.zeros(6, 2, 8) for name in ("query", "key", "value")}
    arguments = fitting | change
    with pytest.raises(ValueError, match=name):
        packed_attention(plan=PackedPlan(arguments.pop("lengths"), CPU), scale=1.0, **arguments)
