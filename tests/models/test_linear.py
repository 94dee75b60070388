"""Packed linears: what they compute equals the plain layer, and the weight can be had back bit for bit."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from chorus.models.linear import wrap
from chorus.models.sites import Site


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_a_packed_layer_computes_what_the_plain_one_does(transposed: bool, rows: int) -> None:
    torch.manual_seed(0)
    plain = (Conv1D(48, 64) if transposed else nn.Linear(64, 48)).bfloat16().requires_grad_(False)
    plain.bias.add_(torch.randn(48))
    weight = plain.weight.clone()
    packed = wrap(plain, Site("x", 64, 48, has_bias=True, transposed=transposed))
    packed.pack(keep_weight=False)
    x = torch.randn(1, rows, 64).bfloat16()
    exact = x.double() @ (weight if transposed else weight.T).double() + plain.bias.double()
    with torch.inference_mode():
        got = packed(x)
    error = (got.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert error <= 4e-3
    assert got.shape == (1, rows, 48)
    assert torch.equal(packed.base_weight(), weight)
    assert packed.weight.numel() == 0


def test_a_shared_weight_stays_where_it_is() -> None:
    plain = nn.Linear(8, 8).bfloat16().requires_grad_(False)
    packed = wrap(plain, Site("x", 8, 8))
    packed.pack(keep_weight=True)
    assert packed.weight is plain.weight
