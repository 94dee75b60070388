"""What a tensor's name says in a LoRA file, and the copies of the base that PEFT puts beside the adapter.

When `lm_head` or `embed_tokens` is targeted, PEFT saves the frozen base weight with the adapter, and the bias where
there is one (`lm_head.base_layer.weight`; seen in 0.21 for tied and untied heads alike), and loading such a file
*replaces* what the base has. For one frozen base under many adapters that is allowed only where it changes nothing: a
copy is dropped when it equals the base's own bit by bit once the finer of the two is rounded to the coarser dtype, and
refused by name when it differs or when there is nothing to compare it with.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from chorus.adapters.strict_json import quote
from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.models.sites import Site

_PARTNERS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
_BASE_COPY = re.compile(r"(?P<site>.+)\.base_layer\.(?P<which>weight|bias)")
_NOT_YET = {
    ".lora_magnitude_vector": "DoRA is not supported yet",
    ".lora_B.bias": "LoRA with a bias is not supported yet",
}


@dataclass(frozen=True, slots=True)
class LoraPair:
    """What the file calls one module's tensors, and their shapes as stored: a [r, in], b [out, r].

    Of an embedding `in` is the vocabulary, and the names are others.
    """

    a_name: str
    a: torch.Size
    b_name: str
    b: torch.Size

    @property
    def is_embedding(self) -> bool:
        return self.a_name.endswith(".lora_embedding_A")


@dataclass(frozen=True, slots=True)
class SortedTensors:
    """`pairs` by module; `base_copies`, the file's name by the base's, `MODULE.weight` or `.bias`."""

    pairs: dict[str, LoraPair] = field(default_factory=dict)
    base_copies: dict[str, str] = field(default_factory=dict)


def sort_tensors(shapes: Mapping[str, torch.Size]) -> SortedTensors:
    """Sorts a LoRA file's tensors, their shapes by name, by what they are.

    Raises:
        InvalidArgument: one of A and B without the other.
        FailedPrecondition: a tensor that plain LoRA does not have.
    """
    result = SortedTensors()
    for name, shape in shapes.items():
        if found := _split(name):
            module, suffix, partner = found
            if partner not in shapes:
                _refuse_half(name, partner)
            if suffix in _PARTNERS:
                result.pairs[module] = LoraPair(name, shape, partner, shapes[partner])
        elif copy := _BASE_COPY.fullmatch(name):
            result.base_copies[f"{copy['site']}.{copy['which']}"] = name
        else:
            hint = next((text for suffix, text in _NOT_YET.items() if name.endswith(suffix)), None)
            raise FailedPrecondition(
                f"tensor {quote(name, 200)} is not supported: {hint or 'plain LoRA has no such tensor'}",
                reason="UNSUPPORTED_TENSOR" if hint else "UNKNOWN_TENSOR",
            )
    return result


def _split(name: str) -> tuple[str, str, str] | None:
    """Module, suffix and partner's name of one half of a pair; None for anything else."""
    for a, b in _PARTNERS.items():
        for suffix, other in ((a, b), (b, a)):
            if name.endswith(suffix):
                module = name.removesuffix(suffix)
                return module, suffix, module + other
    return None


def refuse_foreign_copies(
    copies: Mapping[str, Tensor], sites: Mapping[str, Site], base_weight: Callable[[str], Tensor | None] | None
) -> None:
    """Checks that each copy is the base's own weight.

    Raises:
        FailedPrecondition: it is not, or there is nothing to compare it with.
    """
    for name, copy in copies.items():
        module, _, which = name.rpartition(".")
        own = base_weight(name) if base_weight and module in sites else None
        if own is None or not _is_copy(copy, own):
            problem = "is not" if own is not None else "can not be compared with"
            raise FailedPrecondition(
                f"tensor {quote(f'{module}.base_layer.{which}', 200)} {problem} this base's {which}, and trained ones "
                "are not supported yet; save the adapter with save_embedding_layers=False",
                reason="BASE_WEIGHT_IN_FILE",
            )


def _is_copy(copy: Tensor, weight: Tensor) -> bool:
    if copy.shape != weight.shape:
        return False
    weight = weight.detach().to("cpu")
    coarser = min(copy.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    return bool((copy.to(coarser) == weight.to(coarser)).all())


def _refuse_half(name: str, partner: str) -> NoReturn:
    raise InvalidArgument(
        f"tensor {quote(name, 200)} is there, but {quote(partner, 200)} is missing", reason="INCOMPLETE_FILE"
    )
