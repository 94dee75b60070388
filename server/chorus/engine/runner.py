"""Runs the base model once over a packed batch. Owns the KV cache's tensors; knows nothing of requests' states."""

from itertools import chain

import torch
from torch import Tensor

from chorus.adapters.pool import AdapterPool
from chorus.engine.layout import Layout
from chorus.kernels import AttentionPlan
from chorus.models.attention import StepAttention
from chorus.models.base import Base


class Runner:
    """The base model with its KV cache of `kv_blocks` pages and its adapter pool."""

    def __init__(self, base: Base, pool: AdapterPool, *, kv_blocks: int, block_size: int) -> None:
        self._base = base
        self._pool = pool
        self._block_size = block_size
        shape = (base.layers, kv_blocks, base.kv_heads, block_size, base.head_dim)
        self._k_cache = torch.zeros(shape, dtype=base.dtype, device=base.device)
        self._v_cache = torch.zeros(shape, dtype=base.dtype, device=base.device)
        for name, layer in base.adapted.items():
            layer.pool = pool.pools[name]

    @torch.inference_mode()
    def forward(self, layout: Layout) -> Tensor:
        """Logits [L, V] of the layout's `logit_rows`; the keys and values of all its rows are in the cache then."""
        device = self._base.device
        self._set_plans(layout)
        self._set_frequencies(layout)
        step = StepAttention(AttentionPlan(layout.rows, self._block_size, device), self._k_cache, self._v_cache)
        token_ids, positions, logit_rows = upload(layout.token_ids, layout.positions, layout.logit_rows, device=device)
        output = self._base.module(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logit_rows,
            chorus_step=step,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _set_plans(self, layout: Layout) -> None:
        """Tells each adapted layer what to add; lm_head sees the logits' rows only and has a table of its own."""
        plans = self._pool.plans(layout.segments)
        head_plans = self._pool.plans(layout.logit_segments)
        for name, layer in self._base.adapted.items():
            layer.plan = (head_plans if layer.site.is_lm_head else plans).get(name)

    def _set_frequencies(self, layout: Layout) -> None:
        """Tells a rotary embedding with two sets of frequencies which rows take the long one."""
        if (rope := self._base.longrope) is None:
            return
        is_long = [
            length > rope.boundary
            for row, length in zip(layout.rows, layout.lengths, strict=True)
            for _ in range(row.start, row.end)
        ]
        rope.is_long = torch.tensor(is_long, device=self._base.device)


def upload(*lists: list[int], device: torch.device) -> tuple[Tensor, ...]:
    """The lists as int64 tensors on the device, in one copy that nobody waits for."""
    flat = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64, pin_memory=device.type == "cuda")
    parts: tuple[Tensor, ...] = flat.to(device, non_blocking=True).split([len(part) for part in lists])
    return parts
