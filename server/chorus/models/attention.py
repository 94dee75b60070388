"""The attention function that base models run with: transformers' hook on one side, the paged KV cache on the other.

The runner passes a `StepAttention` into the model's forward under the keyword `chorus_step`; transformers hands it
through every layer to this function. No mask function is registered under our name, so transformers builds no mask.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from chorus.kernels import AttentionPlan, RopePlan, paged_attention, store_kv

NAME = "chorus_paged"


@dataclass(frozen=True, slots=True)
class StepAttention:
    """What every layer's attention needs in one step; the caches are [layers, blocks, H_kv, block_size, D].

    `wanted` [L] are the rows that the last layer, where it is a `block.Block`, computes past attention; None: all.
    """

    plan: AttentionPlan
    k_cache: Tensor
    v_cache: Tensor
    wanted: Tensor | None = None
    _ropes: dict[int, RopePlan] = field(default_factory=dict)

    def rope(self, cos: Tensor, sin: Tensor) -> RopePlan:
        """The rotation by cos and sin, [1, T, R], whose halves are alike; made once for all layers that share them."""
        key = id(cos)
        if key not in self._ropes:
            half = cos.shape[-1] // 2
            self._ropes[key] = RopePlan(cos[0, :, :half], sin[0, :, :half], self.plan.slots, ends=self.plan.ends)
        return self._ropes[key]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    chorus_step: StepAttention,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, H_kv, T, D], rotated where the family rotates. Returns [1, T, H, D]."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    k_cache, v_cache = chorus_step.k_cache[layer], chorus_step.v_cache[layer]
    plan = chorus_step.plan
    store_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), k_cache, v_cache, plan.slots, plan.ends)
    attended = paged_attention(
        query[0].transpose(0, 1).contiguous(),
        k_cache,
        v_cache,
        plan,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window,
        soft_cap=softcap,
    )
    return attended[None], None


AttentionInterface.register(NAME, attend)
