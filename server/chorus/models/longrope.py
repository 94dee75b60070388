"""Long-context rotation by row: each sequence of a pack gets the frequencies that it would get alone.

LongRoPE (Phi-3-128k) has two sets of frequencies and takes the long one once a sequence outgrows the length that the
model was first trained with. transformers decides that for a whole forward pass, by its longest row. A sequence that
grows past the boundary is computed anew with the long set, as transformers' `generate` does; that is the scheduler's
part.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from chorus.errors import FailedPrecondition

LONGROPE = "longrope"


class RowwiseLongRope(nn.Module):
    """In the place of a model's rotary embedding; `is_long` [T] is set before each step by the runner."""

    short: Tensor
    long: Tensor

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__()
        init: Any = ROPE_INIT_FUNCTIONS[LONGROPE]
        self.boundary = boundary_of(config)
        short, self.attention_scaling = init(config, device, seq_len=self.boundary)
        long, _ = init(config, device, seq_len=self.boundary + 1)
        self.register_buffer("short", short.float(), persistent=False)
        self.register_buffer("long", long.float(), persistent=False)
        self.is_long: Tensor | None = None

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [1, T, D] each, for positions [1, T]."""
        if self.is_long is None or len(self.is_long) != position_ids.shape[-1]:
            raise RuntimeError("is_long was not set for these rows")
        frequencies = torch.where(self.is_long[:, None], self.long, self.short)  # [T, D / 2]
        angles = position_ids[..., None].float() * frequencies
        both = torch.cat((angles, angles), dim=-1)
        return (
            (both.cos() * self.attention_scaling).to(x.dtype),
            (both.sin() * self.attention_scaling).to(x.dtype),
        )  # fmt: skip


def boundary_of(config: Any) -> int:
    """The longest sequence, in tokens, that is rotated by the short frequencies."""
    return int(config.rope_parameters["original_max_position_embeddings"])


def replace_longrope(module: nn.Module, config: Any) -> RowwiseLongRope | None:
    """Puts a row-wise rotary embedding into a model that uses longrope; None where it does not.

    Raises:
        FailedPrecondition: the model has not exactly one rotary embedding that can be replaced.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != LONGROPE:
        return None
    found = [name for name, part in module.named_modules() if getattr(part, "rope_type", None) == LONGROPE]
    if len(found) != 1:
        raise FailedPrecondition(
            f"rope_type {LONGROPE!r} is not served for model type {config.model_type!r}", reason="UNSUPPORTED_MODEL"
        )
    rope = RowwiseLongRope(config, next(module.parameters()).device)
    module.set_submodule(found[0], rope)
    return rope
