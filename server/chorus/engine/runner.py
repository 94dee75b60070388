"""Runs the base model once over a packed batch. Owns the KV cache's tensors; knows nothing of requests' states."""

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from chorus.adapters.pool import AdapterPool
from chorus.engine.graphs import Record, StaticStep, StepGraphs, carry, most_with_prompts
from chorus.engine.layout import Layout
from chorus.kernels import AttentionPlan, LowRankPlan
from chorus.models.attention import StepAttention
from chorus.models.base import Base


class Runner:
    """The base model with its KV cache of `kv_blocks` pages and its adapter pool.

    With `record` steps of few tokens run as graphs (`engine.graphs`).
    """

    def __init__(
        self, base: Base, pool: AdapterPool, *, kv_blocks: int, block_size: int, record: Record | None = None
    ) -> None:
        self._base = base
        self._pool = pool
        self._block_size = block_size
        blocks = kv_blocks if record is None else kv_blocks + 1  # the last is the graphs', for rows of nobody
        shape = (base.layers, blocks, base.kv_heads, block_size, base.head_dim)
        self._k_cache = torch.zeros(shape, dtype=base.dtype, device=base.device)
        self._v_cache = torch.zeros(shape, dtype=base.dtype, device=base.device)
        for name, layer in base.adapted.items():
            layer.pool = pool.pools[name]
        if base.device.type == "cpu":
            from chorus.kernels.native import prepare  # numba is not everywhere

            prepare(base.dtype, base.head_dim, block_size)
        self.graphs: StepGraphs | None = None
        if record is not None:
            memory = {"block_size": block_size, "scratch_block": kv_blocks}
            self.graphs = StepGraphs(
                record,
                self._compute_static,
                lambda shape: StaticStep(shape, pool, base.head_sites, **memory, device=base.device),
                pool,
                most_with_prompts(base.facts.parameter_count),
            )

    @torch.inference_mode()
    def forward(self, layout: Layout, drawn: Tensor | None = None) -> Tensor:
        """Logits [L, V] of the layout's `logit_rows`; the keys and values of all its rows are in the cache then.

        `drawn` has the tokens that the layout's `carried` are places of.
        """
        is_long = self._are_long(layout)
        if self.graphs is not None and (replayed := self.graphs.run(layout, is_long, drawn)) is not None:
            return replayed
        device = self._base.device
        plan = AttentionPlan(layout.rows, self._block_size, device)
        rows = [] if layout.wants_all else layout.logit_rows
        token_ids, positions, long, wanted = upload(
            layout.carried or layout.token_ids, layout.positions, is_long, rows, device=device
        )
        if drawn is not None:
            token_ids = carry(drawn, token_ids)
        plans, head_plans = self._pool.plans(layout.segments), self._pool.plans(layout.logit_segments)
        return self._compute(plan, token_ids, positions, long, None if layout.wants_all else wanted, plans, head_plans)

    @property
    def can_rehearse(self) -> bool:
        """Whether a step can be recorded that has come, but not often. On CUDA, where it may take a second, never."""
        return self.graphs is not None and self._base.device.type == "cpu" and self.graphs.can_rehearse

    @torch.inference_mode()
    def rehearse(self) -> bool:
        """Records one of those, if there is one, which takes as long as several steps."""
        return self.can_rehearse and self.graphs is not None and self.graphs.rehearse()

    def _compute_static(self, step: StaticStep) -> Tensor:
        plans = step.deltas.plans if step.deltas is not None else {}
        inputs = step.token_ids, step.positions, step.is_long, step.wanted
        return self._compute(step.attention, *inputs, plans, head_plans=plans)

    def _compute(
        self,
        attention: AttentionPlan,
        token_ids: Tensor,
        positions: Tensor,
        is_long: Tensor,
        wanted: Tensor | None,
        plans: Mapping[str, LowRankPlan],
        head_plans: Mapping[str, LowRankPlan],
    ) -> Tensor:
        """Logits of the `wanted` rows, of all if None; what sees these alone, `head_sites`, has `head_plans`."""
        base = self._base
        for name, layer in base.adapted.items():
            plan = (head_plans if name in base.head_sites else plans).get(name)
            if layer.plan is not plan:  # a module's attribute is dear to set, and plans outlive steps
                layer.plan = plan
        if base.longrope is not None:
            base.longrope.is_long = is_long.bool()
        output = base.module(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if wanted is None or base.narrows else wanted,  # 0: all that are left
            chorus_step=StepAttention(attention, self._k_cache, self._v_cache, wanted),
        )
        logits: Tensor = output.logits[0]
        return logits

    def _are_long(self, layout: Layout) -> list[bool]:
        """For each row, whether its sequence is rotated by the long frequencies, where the model has two sets."""
        if (rope := self._base.longrope) is None:
            return [False] * len(layout.token_ids)
        return [
            length > rope.boundary
            for row, length in zip(layout.rows, layout.lengths, strict=True)
            for _ in range(row.start, row.end)
        ]


def upload(*lists: list[int] | list[bool], device: torch.device) -> tuple[Tensor, ...]:
    """The lists as int64 tensors on the device, in one copy that nobody waits for."""
    flat = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64, pin_memory=device.type == "cuda")
    parts: tuple[Tensor, ...] = flat.to(device, non_blocking=True).split([len(part) for part in lists])
    return parts
