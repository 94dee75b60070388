"""The compiled CPU kernels between a layer's linears: what tests of the operators, for all devices, do not say."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from chorus.kernels import (
    Norm,
    RopePlan,
    RowPlan,
    SlotSegment,
    gelu_tanh_mul,
    qk_norm_rope_store,
    reference,
    residual_norm,
    silu_mul,
    store_kv,
)
from support.rows import noise

ROWS = 160  # enough that each operator takes all threads
CPU = torch.device("cpu")


def norm_of_a_sum() -> list[torch.Tensor]:
    residual, x = (noise(i, ROWS, 1024).bfloat16() for i in range(2))
    return [residual_norm(residual, x, Norm("rms", noise(2, 1024).bfloat16(), 1e-6)), residual]


def gated() -> list[torch.Tensor]:
    gate, up = noise(0, ROWS, 512).bfloat16().chunk(2, dim=-1)
    return [silu_mul(gate, up), gelu_tanh_mul(gate, up)]


def rotated_and_stored() -> list[torch.Tensor]:
    qkv, (cos, sin) = noise(0, ROWS, 32, 16).bfloat16(), noise(1, 2, ROWS, 8).bfloat16()
    k_cache, v_cache = (torch.zeros(ROWS // 4, 4, 4, 16).bfloat16() for _ in range(2))
    norm = Norm("rms", noise(2, 16).bfloat16(), 1e-6)
    plan = RopePlan(cos, sin, torch.arange(ROWS).flip(0).contiguous())
    return [qk_norm_rope_store(qkv, k_cache, v_cache, plan, q_norm=norm, k_norm=norm), k_cache, v_cache]


def stored() -> list[torch.Tensor]:
    k_cache, v_cache = (torch.zeros(ROWS // 4, 8, 4, 16) for _ in range(2))
    store_kv(noise(0, ROWS, 8, 16), noise(1, ROWS, 8, 16), k_cache, v_cache, torch.arange(ROWS).flip(0))
    return [k_cache, v_cache]


@pytest.mark.parametrize("compute", [norm_of_a_sum, gated, rotated_and_stored, stored], ids=lambda f: f.__name__)
def test_threads_change_no_bit(compute: Callable[[], list[torch.Tensor]]) -> None:
    threads = torch.get_num_threads()
    try:
        outcomes = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes += [compute() for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(torch.equal(*pair) for pair in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_of_every_gate_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    gate = gate[:, (gate < -89)[0] | (gate > -88)[0] | gate.isnan()[0]]  # between these e^88 and the smallest numbers
    expected = F.silu(gate)
    torch.testing.assert_close(silu_mul(gate, torch.ones_like(gate)), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_of_every_gate_is_its_definition_rounded(dtype: torch.dtype) -> None:
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    gate = gate[:, (gate.abs() < 1e4)[0]]
    wide = gate.double()
    exact = wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))  # where 1 + tanh would cancel
    got = gelu_tanh_mul(gate, torch.ones_like(gate))
    of = torch.finfo(dtype)
    torch.testing.assert_close(got.double(), exact, rtol=of.eps / 2 + 1e-5, atol=max(of.tiny * of.eps, 1e-36))


def test_rows_after_those_of_a_plan_are_normed_with_the_bases_vectors() -> None:
    norm = Norm("rms", noise(0, 8).bfloat16(), 1e-6, None, noise(1, 2, 8).bfloat16())
    h = noise(2, 5, 8).bfloat16()
    out = residual_norm(h.clone(), None, norm, RowPlan([SlotSegment(1, 2, 1)], 3, CPU))
    plain = residual_norm(h.clone(), None, Norm("rms", norm.weight, 1e-6))
    assert torch.equal(out[[0, 2, 3, 4]], plain[[0, 2, 3, 4]])
    assert not torch.equal(out[1], plain[1])


def test_what_is_kept_ends_where_the_specification_says() -> None:
    limit = torch.tensor(reference.KV_LIMIT)
    edges = torch.stack([limit, limit.nextafter(torch.tensor(0.0)), limit.nextafter(torch.tensor(1e38)), -limit])
    new = edges.view(4, 1, 1)
    keys, values, expected = (torch.zeros(1, 1, 4, 1) for _ in range(3))
    store_kv(new, new, keys, values, torch.arange(4))
    reference.store_kv(new, new, expected, expected, torch.arange(4))
    assert torch.equal(keys, expected)
    assert torch.equal(values, expected)
    assert int((expected != 0).sum()) == 1


@pytest.mark.parametrize("slots", [[0, 16], [-1, 3]])
def test_a_plan_whose_slots_lie_outside_of_the_cache_is_refused(slots: list[int]) -> None:
    plan = RopePlan(torch.ones(2, 2), torch.zeros(2, 2), torch.tensor(slots))
    cache = torch.zeros(2, 1, 8, 4)
    with pytest.raises(ValueError, match=f"plan: slots {min(slots)} to {max(slots)} do not lie in 2 blocks"):
        qk_norm_rope_store(torch.ones(2, 3, 4), cache, cache, plan)
    assert not cache.any()


def test_a_cache_in_pieces_is_refused() -> None:
    whole = torch.zeros(2, 1, 8, 4)
    pieces = torch.zeros(2, 1, 4, 8).transpose(2, 3)
    with pytest.raises(ValueError, match="v_cache: want a contiguous tensor"):
        store_kv(torch.ones(2, 1, 4), torch.ones(2, 1, 4), whole, pieces, torch.arange(2))


def test_slots_that_lie_apart_are_refused() -> None:
    cache, new = torch.zeros(2, 1, 8, 4), torch.ones(2, 1, 4)
    with pytest.raises(ValueError, match="slots: want a contiguous"):
        store_kv(new, new, cache, cache.clone(), torch.arange(4)[::2])
