"""What a tensor's name says in a LoRA file, and the copies of the base that PEFT puts beside the adapter.

When `lm_head` or `embed_tokens` is targeted, PEFT saves the frozen base weight with the adapter
(`lm_head.base_layer.weight`; seen in 0.21 for tied and untied heads alike), and loading such a file *replaces* the
base's weight. For one frozen base under many adapters that is allowed only where it changes nothing: a copy is dropped
when it equals the base's weight bit by bit once the finer of the two is rounded to the coarser dtype, and refused by
name when it differs or when there is nothing to compare it with.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from torch import Tensor

from chorus.adapters.strict_json import quote
from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.models.sites import Site

_A = ".lora_A.weight"
_B = ".lora_B.weight"
_BASE_COPY = ".base_layer.weight"
_NOT_YET = {
    ".lora_embedding_A": "LoRA on an embedding is not supported yet",
    ".lora_embedding_B": "LoRA on an embedding is not supported yet",
    ".lora_magnitude_vector": "DoRA is not supported yet",
    ".lora_B.bias": "LoRA with a bias is not supported yet",
    ".base_layer.bias": "trained biases are not supported yet",
}


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One module's tensors as stored: a [r, in], b [out, r], and what the file calls them."""

    a_name: str
    a: Tensor
    b_name: str
    b: Tensor


@dataclass(frozen=True, slots=True)
class SortedTensors:
    """`pairs` by module; `base_copies` by module, the base's weight as the file has it."""

    pairs: dict[str, LoraPair] = field(default_factory=dict)
    base_copies: dict[str, Tensor] = field(default_factory=dict)


def sort_tensors(tensors: Mapping[str, Tensor]) -> SortedTensors:
    """Sorts a LoRA file's tensors by what they are.

    Raises:
        InvalidArgument: one of A and B without the other.
        FailedPrecondition: a tensor that plain LoRA does not have.
    """
    result = SortedTensors()
    for name, tensor in tensors.items():
        if name.endswith(_A):
            module = name.removesuffix(_A)
            partner = module + _B
            if partner not in tensors:
                _refuse_half(name, partner)
            result.pairs[module] = LoraPair(name, tensor, partner, tensors[partner])
        elif name.endswith(_B):
            partner = name.removesuffix(_B) + _A
            if partner not in tensors:
                _refuse_half(name, partner)
        elif name.endswith(_BASE_COPY):
            result.base_copies[name.removesuffix(_BASE_COPY)] = tensor
        else:
            hint = next((text for suffix, text in _NOT_YET.items() if name.endswith(suffix)), None)
            raise FailedPrecondition(
                f"tensor {quote(name, 200)} is not supported: {hint or 'plain LoRA has no such tensor'}",
                reason="UNSUPPORTED_TENSOR" if hint else "UNKNOWN_TENSOR",
            )
    return result


def refuse_foreign_copies(
    copies: Mapping[str, Tensor], sites: Mapping[str, Site], base_weight: Callable[[str], Tensor | None] | None
) -> None:
    """Checks that each copy is the base's own weight.

    Raises:
        FailedPrecondition: it is not, or there is nothing to compare it with.
    """
    for module, copy in copies.items():
        weight = base_weight(module) if base_weight and module in sites else None
        if weight is None or not _is_copy(copy, weight):
            problem = (
                "is not this base's weight" if weight is not None else "can not be compared with this base's weight"
            )
            raise FailedPrecondition(
                f"tensor {quote(module + _BASE_COPY, 200)} {problem}; "
                "save the adapter with save_embedding_layers=False",
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
