"""What Triton would be asked for: kernels, grids, numbers, and where tensors lie. A CUDA graph repeats just that."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

KERNELS = {
    "triton_low_rank": ("shrink_rows", "shrink_tiles", "expand_rows", "expand_tiles", "fused_rows"),
    "triton_low_rank_slots": ("shrink_slots", "expand_slots"),
    "triton_attention": ("store_kv", "attend", "combine"),
    "triton_head": ("segment_linear",),
    "triton_pointwise": ("residual_norm", "gated_mul"),
    "triton_rope_store": ("qk_norm_rope_store",),
    "triton_row_ops": ("update_rows",),
}
Launch = tuple[str, tuple[int, ...], dict[str, Any]]


class Noted:
    """In place of a kernel: notes launches, computes nothing."""

    def __init__(self, name: str, launches: list[Launch]) -> None:
        self._name, self._launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**given: Any) -> None:
            self._launches.append((self._name, grid, {key: _noted(value) for key, value in given.items()}))

        return launch


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for module, names in KERNELS.items():
            for name in names:
                patch.setattr(f"chorus.kernels.{module}.{name}", Noted(name, launches))
        yield launches


def _noted(value: Any) -> Any:
    """Where in its memory a tensor begins, and how it lies there; numbers as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype
