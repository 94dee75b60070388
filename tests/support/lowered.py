"""Lowered adapters, whole and site by site."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.adapters.artifact import Artifact
from chorus.adapters.host_memory import stacks
from chorus.adapters.kinds import Lowering
from chorus.adapters.lowered import LoweredAdapter


class Factors(NamedTuple):
    a: Tensor
    b: Tensor
    scale: float


def lower(lowering: Lowering, artifact: Artifact, dtype: torch.dtype = torch.float32) -> LoweredAdapter:
    return lowering.fit(artifact).lower(artifact.tensors, dtype)


def of_factors(factors: Mapping[str, Factors]) -> LoweredAdapter:
    """Of factors by site."""
    return LoweredAdapter(
        "LORA",
        {name: len(its.a) for name, its in factors.items()},
        {name: its.scale for name, its in factors.items()},
        stacks({name: its.a for name, its in factors.items()}, next(iter(factors.values())).a.dtype),
        stacks({name: its.b for name, its in factors.items()}, next(iter(factors.values())).b.dtype),
    )


def factors_of(adapter: LoweredAdapter) -> dict[str, Factors]:
    """By site, which each stack names once."""
    a, b = (
        {name: tensor for stack in its for name, tensor in zip(stack.sites, stack.memory, strict=True)}
        for its in (adapter.a, adapter.b)
    )
    assert a.keys() == b.keys() == adapter.ranks.keys() == adapter.scales.keys()
    assert sum(len(stack.sites) for stack in adapter.a) == sum(len(stack.sites) for stack in adapter.b) == len(a)
    assert {name: len(factor) for name, factor in a.items()} == adapter.ranks
    return {name: Factors(a[name], b[name], adapter.scales[name]) for name in adapter.ranks}
