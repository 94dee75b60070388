"""How a LoRA file fits a base: everything about it but its numbers.

What one recipe trains on one base has the same config and the same tensors, so a base's fits are remembered: looking
at all names again was a quarter of what a small adapter took to load, all of it Python, and a step waits for Python.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from chorus.adapters.artifact import Artifact
from chorus.adapters.host_memory import stacks
from chorus.adapters.lora_config import LoraConfig
from chorus.adapters.lora_tensors import LoraPair, sort_tensors
from chorus.adapters.lowered import LoweredAdapter
from chorus.adapters.strict_json import canonical, quote
from chorus.adapters.targets import Targets
from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.models.sites import Site

_KEPT = 64
# Of files and configs that are larger none is remembered: they are strangers', and memory for them is nobody's.
_KEPT_TENSORS, _KEPT_BYTES = 4096, 1 << 14

_FOREIGN = "the adapter was made for another base, or adapts what is not served"
_HINTS = {
    "embed_positions": "PEFT looks up the attention mask there, not the positions, so what it trains means nothing; "
    "train without it"
}


@dataclass(frozen=True, slots=True)
class LoraFit:
    """Of each adapted site, in the base's order, its rank and scale, and what the file calls its A and B.

    `base_copies`: the file's name of each copy of a weight of the base, by the base's.
    """

    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    a_names: Mapping[str, str]
    b_names: Mapping[str, str]
    base_copies: Mapping[str, str]

    @property
    def kind(self) -> str:
        return "LORA"

    def lower(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LoweredAdapter:
        """The adapter that has these numbers, in `dtype` and in memory of its own: the file's can be freed."""
        a = stacks({site: tensors[name] for site, name in self.a_names.items()}, dtype)
        b = stacks({site: tensors[name].mT for site, name in self.b_names.items()}, dtype)
        return LoweredAdapter(self.kind, self.ranks, self.scales, a, b)


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What a fit depends on: the config's fields that count, as JSON, and the tensors' shapes by name."""

    identity: bytes
    shapes: tuple[tuple[str, torch.Size], ...]
    config: LoraConfig = field(compare=False)


class LoraFits:
    """Fits LoRA files onto the base that has these sites, keyed by name. From any thread."""

    def __init__(self, sites: Mapping[str, Site], max_rank: int) -> None:
        self._sites = sites
        self._max_rank = max_rank
        self._look_once = lru_cache(maxsize=_KEPT)(self._look)

    def of(self, artifact: Artifact) -> LoraFit:
        """Every targeted site has its tensors, every tensor its targeted site, all of the right shapes.

        Raises:
            InvalidArgument: the file contradicts itself: half a pair, ranks unlike the config's.
            FailedPrecondition: it does not fit the base or the server.
        """
        shapes = tuple((name, tensor.shape) for name, tensor in artifact.tensors.items())
        recipe = _Recipe(canonical(artifact.config.identity()), shapes, artifact.config)
        is_small = len(shapes) <= _KEPT_TENSORS and len(recipe.identity) <= _KEPT_BYTES
        return (self._look_once if is_small else self._look)(recipe)

    def _look(self, recipe: _Recipe) -> LoraFit:
        targets = Targets(recipe.config, self._sites.values())
        tensors = sort_tensors(dict(recipe.shapes))
        _check_modules(recipe.config, targets, tensors.pairs, self._sites)
        pairs = {name: tensors.pairs[name] for name in self._sites if name in tensors.pairs}
        for name, pair in pairs.items():
            _check_shapes(pair, self._sites[name], targets.rank(name), self._max_rank)
        return LoraFit(
            ranks={name: targets.rank(name) for name in pairs},
            scales={name: targets.scale(name) * self._sites[name].scale for name in pairs},
            a_names={name: pair.a_name for name, pair in pairs.items()},
            b_names={name: pair.b_name for name, pair in pairs.items()},
            base_copies=tensors.base_copies,
        )


def _check_modules(
    config: LoraConfig, targets: Targets, pairs: Mapping[str, LoraPair], sites: Mapping[str, Site]
) -> None:
    """The modules with tensors are exactly the targeted sites."""
    for module, pair in pairs.items():
        if module not in sites:
            raise FailedPrecondition(
                f"tensor {quote(pair.a_name, 200)}: this base has no linear, embedding or head {quote(module, 200)}; "
                f"{_HINTS.get(module.rpartition('.')[2], _FOREIGN)}",
                reason="UNKNOWN_MODULE",
            )
        if pair.is_embedding != sites[module].is_embedding:
            kind = "an embedding" if sites[module].is_embedding else "a linear"
            raise FailedPrecondition(
                f"tensor {quote(pair.a_name, 200)}: {quote(module, 200)} is {kind} in this base; "
                "the adapter was made for another base",
                reason="UNKNOWN_MODULE",
            )
        if not targets.matches(module):
            raise FailedPrecondition(
                f"tensor {quote(pair.a_name, 200)}: the config does not target {quote(module, 200)}",
                reason="UNTARGETED_TENSOR",
            )
    targeted = [name for name in sites if targets.matches(name)]
    if not targeted:
        raise FailedPrecondition(
            f"target_modules = {quote(config.identity()['target_modules'])} names no module of this base",
            reason="NOTHING_TARGETED",
            field="target_modules",
        )
    missing = [name for name in targeted if name not in pairs]
    if missing:
        raise FailedPrecondition(
            f"the config targets {quote(missing[0], 200)} ({len(missing)} such modules in all), but the file has no "
            "tensors for it; the adapter was made for another base",
            reason="MISSING_TENSOR",
        )


def _check_shapes(pair: LoraPair, site: Site, rank: int, max_rank: int) -> None:
    for name, shape, fixed, features in (
        (pair.a_name, pair.a, 1, site.in_features),
        (pair.b_name, pair.b, 0, site.out_features),
    ):
        expected = [rank, features] if fixed else [features, rank]
        if len(shape) != 2 or shape[fixed] != features:
            raise FailedPrecondition(
                f"tensor {quote(name, 200)}: expected shape {expected}, got {list(shape)}; "
                "the adapter was made for another base",
                reason="SHAPE_MISMATCH",
            )
        if shape[1 - fixed] != rank:
            raise InvalidArgument(
                f"tensor {quote(name, 200)}: the config says rank {rank}, its shape is {list(shape)}",
                reason="RANK_MISMATCH",
            )
    if rank > max_rank:
        raise FailedPrecondition(
            f"{quote(site.name, 200)}: rank {rank} is over this server's limit of {max_rank}; "
            "train a smaller one, or serve with a larger --max-rank",
            reason="RANK_OVER_LIMIT",
        )
