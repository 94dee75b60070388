"""Adapter kinds, lowered to the operators that the engine runs: one class per kind.

    PEFT file ── artifact.read ──> Artifact ── lower ──> LoweredAdapter: per site, what each operator needs

An `Artifact` is sound in itself; lowering is where it meets a base. It knows sites and tensors, no device and no pool.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from chorus.adapters.artifact import Artifact
from chorus.adapters.host_memory import copies
from chorus.adapters.lora_config import LoraConfig
from chorus.adapters.lora_tensors import LoraPair, refuse_foreign_copies, sort_tensors
from chorus.adapters.strict_json import quote
from chorus.adapters.targets import Targets
from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.models.sites import Site

BaseWeight = Callable[[str], Tensor | None]
"""The base's own `SITE.weight` or `SITE.bias`, as the module holds it; None where it can not be had."""


@dataclass(frozen=True, slots=True)
class LowRankFactors:
    """y[T, out] += scale * (x[T, in] a^T) b, with a [r, in] and b [r, out], contiguous, in the file's dtypes."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class LoweredAdapter:
    """One adapter as operators over sites; `low_rank` is keyed by `Site.name`, in the order of the base's sites."""

    kind: str
    low_rank: dict[str, LowRankFactors]

    @property
    def max_rank(self) -> int:
        """The largest rank at any site."""
        return max((factors.rank for factors in self.low_rank.values()), default=0)

    @property
    def rank_rows(self) -> int:
        """Ranks of all sites added up: what the adapter takes of a pool that has rows per site."""
        return sum(factors.rank for factors in self.low_rank.values())

    @property
    def site_count(self) -> int:
        """How many modules of the base the adapter changes."""
        return len(self.low_rank)

    def to(self, dtype: torch.dtype) -> "LoweredAdapter":
        """The same adapter with its factors in another dtype, then in memory of its own."""
        factors = self.low_rank.values()
        if all(f.a.dtype == dtype == f.b.dtype for f in factors):
            return self
        own = copies([f.a for f in factors] + [f.b for f in factors], dtype)
        return LoweredAdapter(self.kind, _factors(self.low_rank, own, [f.scale for f in factors]))

    def bytes(self, dtype_bytes: int) -> int:
        """Bytes of all factors once each element takes `dtype_bytes`."""
        return dtype_bytes * sum(factors.a.numel() + factors.b.numel() for factors in self.low_rank.values())


class Kind(Protocol):
    """A kind of adapter: how what PEFT stores becomes operators."""

    def lower(
        self, artifact: Artifact, sites: Mapping[str, Site], *, max_rank: int, base_weight: BaseWeight | None
    ) -> LoweredAdapter:
        """See `lower` below."""
        ...


class Lora:
    """LoRA and rsLoRA: s (x A^T) B^T, s = alpha/r or alpha/sqrt(r) with the patterned alpha and r.

    A and B do not depend on how the base stores its weight, so GPT-2's Conv1D needs no special care. Of an embedding
    x are one-hot rows; where the base scales what it looks up, PEFT scales the delta too.
    """

    def lower(
        self, artifact: Artifact, sites: Mapping[str, Site], *, max_rank: int, base_weight: BaseWeight | None
    ) -> LoweredAdapter:
        targets = Targets(artifact.config, sites.values())
        tensors = sort_tensors(artifact.tensors)
        refuse_foreign_copies(tensors.base_copies, sites, base_weight)
        _check_modules(artifact.config, targets, tensors.pairs, sites)
        pairs = {name: tensors.pairs[name] for name in sites if name in tensors.pairs}
        for name, pair in pairs.items():
            _check_shapes(pair, sites[name], targets.rank(name), max_rank)
        # Copies, so that the file's memory is free once the caller drops the artifact.
        own = copies([pair.a for pair in pairs.values()] + [pair.b.mT for pair in pairs.values()])
        scales = [targets.scale(name) * sites[name].scale for name in pairs]
        return LoweredAdapter("LORA", _factors(pairs, own, scales))


_FOREIGN = "the adapter was made for another base, or adapts what is not served"
_HINTS = {
    "embed_positions": "PEFT looks up the attention mask there, not the positions, so what it trains means nothing; "
    "train without it"
}

KINDS: dict[str, Kind] = {"LORA": Lora()}


def lower(
    artifact: Artifact, sites: Mapping[str, Site], *, max_rank: int, base_weight: BaseWeight | None = None
) -> LoweredAdapter:
    """Lowers an artifact onto the base that has these sites, keyed by name.

    Nothing is ever left out silently: every targeted site needs its tensors, every tensor its targeted site.
    `base_weight` lets copies of the base in the file be recognised (see `lora_tensors`); without it they are refused.

    Raises:
        InvalidArgument: the file contradicts itself: half a pair, ranks unlike the config's.
        FailedPrecondition: it does not fit this base or server: modules, shapes, a rank over `max_rank`, tensors of
            something not served, or it targets nothing here.
    """
    return KINDS[artifact.config.peft_type].lower(artifact, sites, max_rank=max_rank, base_weight=base_weight)


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
    for name, tensor, fixed, features in (
        (pair.a_name, pair.a, 1, site.in_features),
        (pair.b_name, pair.b, 0, site.out_features),
    ):
        expected = [rank, features] if fixed else [features, rank]
        if tensor.dim() != 2 or tensor.shape[fixed] != features:
            raise FailedPrecondition(
                f"tensor {quote(name, 200)}: expected shape {expected}, got {list(tensor.shape)}; "
                "the adapter was made for another base",
                reason="SHAPE_MISMATCH",
            )
        if tensor.shape[1 - fixed] != rank:
            raise InvalidArgument(
                f"tensor {quote(name, 200)}: the config says rank {rank}, its shape is {list(tensor.shape)}",
                reason="RANK_MISMATCH",
            )
    if rank > max_rank:
        raise FailedPrecondition(
            f"{quote(site.name, 200)}: rank {rank} is over this server's limit of {max_rank}; "
            "train a smaller one, or serve with a larger --max-rank",
            reason="RANK_OVER_LIMIT",
        )


def _factors(names: Iterable[str], tensors: Sequence[Tensor], scales: Sequence[float]) -> dict[str, LowRankFactors]:
    """By name; `tensors` are all A, then all B."""
    count = len(scales)
    return dict(zip(names, map(LowRankFactors, tensors[:count], tensors[count:], scales), strict=True))
