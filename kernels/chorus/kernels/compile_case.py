"""One kernel in one configuration, as it is compiled without a GPU.

A module with Triton kernels offers `compile_cases(arch)`, and is named in `compile_report.MODULES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}


@dataclass(frozen=True, slots=True)
class CompileCase:
    """What `triton.compile` needs.

    `signature` gives each run-time argument its Triton type ("*bf16", "i32"), `constants` the constexpr ones. Arguments
    in `aligned` are multiples of 16, as the launcher finds them. With `expects_dot`, every `tl.dot` must have become a
    matrix instruction.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, int | bool | str | float | None]
    warps: int
    stages: int
    aligned: frozenset[str] = frozenset()
    expects_dot: bool = False

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def configuration(self) -> str:
        """Types, constants and launch options in one line."""
        types = sorted({t for t in self.signature.values() if t.startswith("*")} - {"*i32", "*fp32"})
        sizes = [name for name, kind in self.signature.items() if kind == "i32" and name in self.aligned]
        constants = [
            f"{name.removeprefix('BLOCK_')}={value}" for name, value in self.constants.items() if value is not None
        ]
        return " ".join([*types, *constants, f"warps={self.warps}", f"stages={self.stages}", "16|" + ",".join(sizes)])
