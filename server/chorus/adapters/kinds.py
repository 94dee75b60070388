"""Adapter kinds, fitted to a base and lowered to the operators that the engine runs: one class per kind.

    PEFT file ── artifact.read ──> Artifact ── Lowering.fit ──> Fit ── lower ──> LoweredAdapter

An `Artifact` is sound in itself; a fit is where it meets a base. Both know sites and tensors, no device and no pool.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from chorus.adapters.artifact import Artifact
from chorus.adapters.lora_fit import LoraFits
from chorus.adapters.lora_tensors import refuse_foreign_copies
from chorus.adapters.lowered import LoweredAdapter
from chorus.models.sites import Site

BaseWeight = Callable[[str], Tensor | None]
"""The base's own `SITE.weight` or `SITE.bias`, as the module holds it; None where it can not be had."""


class Fit(Protocol):
    """What an adapter does to a base, without its numbers."""

    @property
    def kind(self) -> str:
        """Of KINDS."""
        ...

    @property
    def ranks(self) -> Mapping[str, int]:
        """By site."""
        ...

    def lower(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LoweredAdapter:
        """The adapter that has these numbers, in `dtype` and in memory of its own."""
        ...


class Kind(Protocol):
    """A kind of adapter on one base: how what PEFT stores becomes operators."""

    def fit(self, artifact: Artifact) -> Fit:
        """See `Lowering.fit`."""
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

    def fit(self, artifact: Artifact) -> Fit:
        fit = self._fits.of(artifact)
        base_copies = {name: artifact.tensors[stored] for name, stored in fit.base_copies.items()}
        refuse_foreign_copies(base_copies, self._sites, self._base_weight)
        return fit


KINDS: dict[str, Callable[[Mapping[str, Site], int, BaseWeight | None], Kind]] = {"LORA": Lora}


class Lowering:
    """Lowers artifacts onto the base that has these sites, keyed by name. From any thread.

    Nothing is ever left out silently: every targeted site needs its tensors, every tensor its targeted site.
    `base_weight` lets copies of the base in the file be recognised (see `lora_tensors`); without it they are refused.
    """

    def __init__(self, sites: Mapping[str, Site], *, max_rank: int, base_weight: BaseWeight | None = None) -> None:
        self._kinds = {name: kind(sites, max_rank, base_weight) for name, kind in KINDS.items()}

    def fit(self, artifact: Artifact) -> Fit:
        """How the adapter fits the base.

        Raises:
            InvalidArgument: the file contradicts itself: half a pair, ranks unlike the config's.
            FailedPrecondition: it does not fit this base or server: modules, shapes, a rank over `max_rank`, tensors
                of something not served, or it targets nothing here.
        """
        return self._kinds[artifact.config.peft_type].fit(artifact)
