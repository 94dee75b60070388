"""Linears computed as one: each member's columns are what it computes alone, with its own adapters' deltas."""

import pytest
import torch
from torch import nn

from chorus.kernels import LowRankPlan, LowRankSegment, RankPool
from chorus.models.group import LinearGroup
from chorus.models.linear import AdaptedLinear
from chorus.models.sites import Site

WIDTHS = (48, 16, 16)


def make_members(dtype: torch.dtype, *, bias: bool) -> tuple[list[AdaptedLinear], list[nn.Linear]]:
    torch.manual_seed(0)
    plain = [nn.Linear(64, width, bias=bias).to(dtype).requires_grad_(False) for width in WIDTHS]
    copies = [nn.Linear(64, width, bias=bias).to(dtype).requires_grad_(False) for width in WIDTHS]
    for copy, one in zip(copies, plain, strict=True):
        copy.load_state_dict(one.state_dict())
    members = [AdaptedLinear(one, Site(f"m{i}", 64, one.out_features)) for i, one in enumerate(plain)]
    return members, copies


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_columns_are_what_each_member_computes_alone(dtype: torch.dtype, bound: float, bias: bool) -> None:
    members, alone = make_members(dtype, bias=bias)
    group = LinearGroup(members)
    if dtype == torch.bfloat16:
        group.pack()
    x = torch.randn(5, 64).to(dtype)
    with torch.inference_mode():
        got = group(x).split(WIDTHS, dim=1)
    for part, linear in zip(got, alone, strict=True):
        exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
        assert float((part.double() - exact).pow(2).mean().sqrt()) <= bound * float(exact.pow(2).mean().sqrt())


def test_a_delta_changes_its_members_columns_alone() -> None:
    members, _ = make_members(torch.float32, bias=False)
    group = LinearGroup(members)
    x = torch.randn(5, 64)
    before = group(x).clone()
    a, b = torch.randn(8, 64), torch.randn(8, 16)
    members[1].pool = RankPool(a, b, torch.full((8,), 0.5))
    members[1].plan = LowRankPlan([LowRankSegment(2, 4, (0, 1, 2))], torch.device("cpu"))
    after = group(x)
    exact = before.double()
    exact[2:4, 48:64] += 0.5 * x[2:4].double() @ a[:3].double().T @ b[:3].double()
    assert torch.allclose(after.double(), exact, atol=1e-5)
    assert torch.equal(after[:, :48], before[:, :48])
    assert torch.equal(after[:, 64:], before[:, 64:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_members_weight_can_be_had_back_bit_for_bit(dtype: torch.dtype) -> None:
    members, alone = make_members(dtype, bias=False)
    group = LinearGroup(members)
    if dtype == torch.bfloat16:
        group.pack()
    for member, linear in zip(members, alone, strict=True):
        assert torch.equal(member.base_weight(), linear.weight)
