"""relative_bias: against transformers' own bias of T5."""

import pytest
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from chorus.kernels import relative_bias


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (16, 20), (64, 200)])
def test_every_distance_has_the_bias_that_t5_gives_it(bidirectional: bool, buckets: int, furthest: int) -> None:
    """Also where distances are cut: 40 further than the last bucket begins."""
    config = T5Config(
        d_model=16,
        d_kv=8,
        num_heads=3,
        is_decoder=not bidirectional,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=furthest,
    )
    attention = T5Attention(config, has_relative_attention_bias=True)
    length = furthest + 40
    expected = attention.compute_bias(length, length)[0]  # [H, query, key]
    table = attention.relative_attention_bias.weight
    bias = relative_bias(table, max_distance=furthest, bidirectional=bidirectional)
    position = torch.arange(length)
    distance = (position - position[:, None]).clamp(-furthest, furthest)
    assert torch.equal(bias[:, distance + furthest], expected)
    assert bias.unique().numel() > buckets


@pytest.mark.parametrize(("shape", "furthest"), [((31, 2), 128), ((32,), 128), ((32, 2), 8)])
def test_a_table_that_does_not_fit_its_distances_is_refused(shape: tuple[int, ...], furthest: int) -> None:
    with pytest.raises(ValueError, match="table"):
        relative_bias(torch.zeros(shape), max_distance=furthest, bidirectional=True)
