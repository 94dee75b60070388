"""Adapter kinds, lowered to the operators that the engine runs: one class per kind.

    PEFT file ── artifact.read ──> Artifact ── Lowering ──> LoweredAdapter: per site, what each operator needs

An `Artifact` is sound in itself; lowering is where it meets a base. It knows sites and tensors, no device and no pool.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from chorus.adapters.artifact import Artifact
from chorus.adapters.host_memory import copies
from chorus.adapters.lora_fit import LoraFits
from chorus.adapters.lora_tensors import refuse_foreign_copies
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
    """A kind of adapter on one base: how what PEFT stores becomes operators."""

    def lower(self, artifact: Artifact) -> LoweredAdapter:
        """See `Lowering` below."""
        ...


class Lora:
    """LoRA and rsLoRA: s (x A^T) B^T, s = alpha/r or alpha/sqrt(r) with the patterned alpha and r.

    A and B do not depend on how the base stores its weight, so GPT-2's Conv1D needs no special care. Of an embedding
    x are one-hot rows; where the base scales what it looks up, PEFT scales the delta too.
    """

    def __init__(self, sites: Mapping[str, Site], max_rank: int, base_weight: BaseWeight | None) -> None:
        self._sites = sites
        self._base_weight = base_weight
        self._fits = LoraFits(sites, max_rank)

    def lower(self, artifact: Artifact) -> LoweredAdapter:
        fit, tensors = self._fits.of(artifact), artifact.tensors
        base_copies = {name: tensors[stored] for name, stored in fit.base_copies.items()}
        refuse_foreign_copies(base_copies, self._sites, self._base_weight)
        # Copies, so that the file's memory is free once the caller drops the artifact.
        own = copies([tensors[name] for name in fit.a_names] + [tensors[name].mT for name in fit.b_names])
        return LoweredAdapter("LORA", _factors(fit.sites, own, fit.scales))


KINDS: dict[str, Callable[[Mapping[str, Site], int, BaseWeight | None], Kind]] = {"LORA": Lora}


class Lowering:
    """Lowers artifacts onto the base that has these sites, keyed by name. From any thread.

    Nothing is ever left out silently: every targeted site needs its tensors, every tensor its targeted site.
    `base_weight` lets copies of the base in the file be recognised (see `lora_tensors`); without it they are refused.
    """

    def __init__(self, sites: Mapping[str, Site], *, max_rank: int, base_weight: BaseWeight | None = None) -> None:
        self._kinds = {name: kind(sites, max_rank, base_weight) for name, kind in KINDS.items()}

    def lower(self, artifact: Artifact) -> LoweredAdapter:
        """The adapter as operators, in memory of its own.

        Raises:
            InvalidArgument: the file contradicts itself: half a pair, ranks unlike the config's.
            FailedPrecondition: it does not fit this base or server: modules, shapes, a rank over `max_rank`, tensors
                of something not served, or it targets nothing here.
        """
        return self._kinds[artifact.config.peft_type].lower(artifact)


def _factors(names: Iterable[str], tensors: Sequence[Tensor], scales: Sequence[float]) -> dict[str, LowRankFactors]:
    """By name; `tensors` are all A, then all B."""
    count = len(scales)
    return dict(zip(names, map(LowRankFactors, tensors[:count], tensors[count:], scales), strict=True))
