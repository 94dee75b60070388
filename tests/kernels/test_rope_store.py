"""qk_norm_rope_store on a CPU, against float64 math and transformers' rotations, and what it refuses."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotate
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb as qwen_rotate

from chorus.kernels import Norm, RopePlan, qk_norm_rope_store, reference
from support.rope_store import EPS, angles, check, turn
from support.rows import DTYPES, check_close, noise

Cache = tuple[torch.Tensor, torch.Tensor]


def caches(kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Cache:
    return torch.zeros(2, kv_heads, 8, dim, dtype=dtype), torch.zeros(2, kv_heads, 8, dim, dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9), heads=st.sampled_from([(1, 1), (4, 1), (6, 2)]),
    sizes=st.sampled_from([(16, 16), (16, 8), (24, 24), (32, 32), (64, 64), (80, 32), (256, 256)]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([None, "rms", "rms_plus_one"]), interleaved=st.booleans(), strided=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_queries_and_pages_are_their_definition(
    rows: int, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype, kind: Any, interleaved: bool,
    strided: bool, seed: int,
) -> None:  # fmt: skip
    if dtype is not torch.float32:
        rows, heads = rows + 24, (6, 2)  # an RMS of a few roundings means nothing
    check(rows, heads, *sizes, dtype, kind=kind, interleaved=interleaved, strided=strided, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["operator", "specification"])
def test_qwens_layers_between_the_products_and_attention(dtype: torch.dtype, path: str) -> None:
    """transformers' q_norm, k_norm and rotation of heads before rows."""
    q_module, k_module = (Qwen3RMSNorm(16, EPS).to(dtype) for _ in range(2))
    torch.nn.init.normal_(q_module.weight)
    torch.nn.init.normal_(k_module.weight)
    qkv = noise(0, 5, 8, 16).to(dtype)
    cos, sin = (t.to(dtype) for t in angles(5, 16, 1))
    q_norm, k_norm = (Norm("rms", m.weight.detach(), EPS) for m in (q_module, k_module))
    query, key = (m(t)[None].transpose(1, 2) for m, t in ((q_module, qkv[:, :4]), (k_module, qkv[:, 4:6])))
    turned = qwen_rotate(query, key, *(torch.cat((t, t), -1)[None] for t in (cos, sin)))
    want_query, want_key = (t[0].transpose(0, 1).detach().double() for t in turned)
    k_cache, v_cache = caches(2, 16, dtype)
    slots = torch.arange(3, 8)
    if path == "operator":
        got = qk_norm_rope_store(qkv, k_cache, v_cache, RopePlan(cos, sin, slots), q_norm=q_norm, k_norm=k_norm)
    else:
        got = reference.qk_norm_rope_store(qkv, k_cache, v_cache, cos, sin, slots, q_norm=q_norm, k_norm=k_norm)
    check_close(got, want_query, dtype)
    check_close(k_cache[0, :, 3:].transpose(0, 1), want_key, dtype)
    assert torch.equal(v_cache[0, :, 3:].transpose(0, 1), qkv[:, 6:])


def test_interleaved_pairs_are_glms() -> None:
    qkv = noise(0, 5, 6, 16)
    cos, sin = (t.float() for t in angles(5, 8, 1))
    both = (torch.cat((t, t), -1)[None] for t in (cos, sin))
    want, _ = glm_rotate(qkv[:, :2][None].transpose(1, 2), qkv[:, 2:4][None].transpose(1, 2), *both)
    got = qk_norm_rope_store(qkv, *caches(2, 16), RopePlan(cos, sin, torch.arange(5), interleaved=True))
    check_close(got, want[0].transpose(0, 1).double(), torch.float32)


def test_the_specification_is_exact_in_float64() -> None:
    qkv, (cos, sin) = noise(0, 3, 4, 8).double(), angles(3, 8, 0)
    k_cache, v_cache = caches(1, 8, torch.float64)
    query = reference.qk_norm_rope_store(qkv, k_cache, v_cache, cos, sin, torch.arange(3))
    z = torch.complex(*qkv.chunk(2, dim=-1)) * torch.complex(cos, sin)[:, None]
    expected = torch.cat((z.real, z.imag), dim=-1)
    torch.testing.assert_close(query, expected[:, :2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(k_cache[0, 0, :3], expected[:, 2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dim", "dtype"), [(4, torch.float32), (32, torch.bfloat16)], ids=str)
def test_a_key_that_is_not_finite_is_stored_as_zero(dim: int, dtype: torch.dtype) -> None:
    qkv = torch.ones(2, 3, dim, dtype=dtype)
    qkv[0, 1, dim // 2] = float("inf")
    qkv[1, 1, 0] = -2e30
    k_cache, v_cache = caches(1, dim, dtype)
    plan = RopePlan(torch.ones(2, dim // 2), torch.zeros(2, dim // 2), torch.tensor([0, 9]))
    qk_norm_rope_store(qkv, k_cache, v_cache, plan)
    # inf * 0 makes a NaN of its partner
    assert (k_cache[0, 0, 0] == 0).nonzero().flatten().tolist() == [0, dim // 2]
    assert (k_cache[1, 0, 1] == 0).nonzero().flatten().tolist() == [0]
    assert v_cache[0, 0, 0].tolist() == [1] * dim


def test_angles_in_float32_turn_heads_in_bfloat16() -> None:
    """As where a base has two sets of frequencies; whole heads, which are turned in registers."""
    qkv, (cos, sin) = noise(0, 50, 4, 64).bfloat16(), (t.float() for t in angles(50, 64, 2))
    k_cache, v_cache = torch.zeros(7, 1, 8, 64).bfloat16(), torch.zeros(7, 1, 8, 64).bfloat16()
    got = qk_norm_rope_store(qkv, k_cache, v_cache, RopePlan(cos, sin, torch.arange(50)))
    exact = turn(qkv.double(), cos.double(), sin.double(), interleaved=False)
    check_close(got, exact[:, :2], torch.bfloat16)
    check_close(k_cache.transpose(1, 2).flatten(0, 1)[:50], exact[:, 2:3], torch.bfloat16)


@pytest.mark.parametrize("largest", [1e30, float(torch.tensor(1e30, dtype=torch.float64).bfloat16())])
def test_the_largest_key_that_is_kept_is_the_specifications(largest: float) -> None:
    """Around the limit number by number, turned by nothing: in registers it is compared by its bits."""
    bits = torch.tensor([largest]).bfloat16().view(torch.int16)
    qkv = (bits + torch.arange(-3, 4, dtype=torch.int16)).view(torch.bfloat16)[:, None, None].expand(7, 3, 32)
    pages = [torch.zeros(2, 2, 1, 8, 32).bfloat16() for _ in range(2)]
    ones, zeros, slots = torch.ones(7, 16), torch.zeros(7, 16), torch.arange(7)
    qk_norm_rope_store(qkv.contiguous(), pages[0][0], pages[0][1], RopePlan(ones, zeros, slots))
    reference.qk_norm_rope_store(qkv, pages[1][0], pages[1][1], ones, zeros, slots)
    assert 0 < int((pages[1][0] == 0).sum()) < pages[1][0].numel()
    assert torch.equal(*pages)


def test_no_rows_are_no_work() -> None:
    plan = RopePlan(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert qk_norm_rope_store(torch.zeros(0, 3, 4), *caches(1, 4), plan).shape == (0, 1, 4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"qkv": torch.zeros(2, 2, 4)}, "qkv: want"),
        ({"qkv": torch.zeros(2, 3, 6)}, "qkv: want"),
        ({"qkv": torch.zeros(2, 4, 3).transpose(1, 2)}, "qkv: a row's heads must be contiguous"),
        ({"qkv": torch.zeros(3, 3, 4)}, "plan: 2 rows"),
        ({"k_cache": torch.zeros(2, 1, 4, 4)}, "k_cache, v_cache: want two"),
        ({"v_cache": torch.zeros(2, 1, 8, 4).half()}, "v_cache: want contiguous"),
        ({"plan": RopePlan(torch.zeros(2, 3), torch.zeros(2, 3), torch.arange(2))}, "plan: rotates 6 of 4"),
        ({"plan": RopePlan(torch.zeros(2, 2).half(), torch.zeros(2, 2).half(), torch.arange(2))}, "plan: rotates"),
        ({"q_norm": Norm("rms", torch.ones(4), EPS)}, "q_norm, k_norm: both"),
        ({"q_norm": Norm("rms", torch.ones(4), 1.0), "k_norm": Norm("rms", torch.ones(4), EPS)}, "k_norm: want an"),
        ({name: Norm("layer", torch.ones(4), EPS) for name in ("q_norm", "k_norm")}, "q_norm: want an RMSNorm"),
        ({name: Norm("rms", torch.ones(5), EPS) for name in ("q_norm", "k_norm")}, "q_norm: weight must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_by_name(arguments: dict[str, Any], says: str) -> None:
    k_cache, v_cache = caches(1, 4)
    plan = RopePlan(torch.zeros(2, 2), torch.zeros(2, 2), torch.arange(2))
    given_: dict[str, Any] = {"qkv": torch.zeros(2, 3, 4), "k_cache": k_cache, "v_cache": v_cache, "plan": plan}
    with pytest.raises(ValueError, match=says):
        qk_norm_rope_store(**(given_ | arguments))


@pytest.mark.parametrize(
    ("cos", "sin", "slots", "says"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.arange(2), "cos, sin: want two alike"),
        (torch.zeros(3, 2).T, torch.zeros(3, 2).T, torch.arange(2), "cos, sin: want contiguous rows"),
        (torch.zeros(2, 0), torch.zeros(2, 0), torch.arange(2), "cos, sin: want contiguous rows of at least 1"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.arange(3), "slots: want int64 .2."),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), "slots: want int64"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.arange(2, device="meta"), "cos, sin, slots: on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_plan_that_makes_no_sense_is_refused(
    cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        RopePlan(cos, sin, slots)
