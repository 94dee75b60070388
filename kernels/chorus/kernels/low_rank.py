"""`low_rank`: adds each segment's low-rank delta to the base's output, many adapters and mixed ranks in one call.

On CPU a compiled kernel runs, and torch for segments of many rows (`low_rank_cpu`). On CUDA the Triton kernels run
(`triton_low_rank`), over tables that the plan puts on the device (`low_rank_tables`). Token ids as x on CUDA, dtypes
without a kernel and other devices take the specification. What a batch needs is planned once and shared by all sites
with the same rows; sites that read the same x are one call, `low_rank_group`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.dispatch import TRITON_DTYPES, runs_native, runs_triton
from chorus.kernels.low_rank_checks import (
    check,
    check_disjoint,
    check_epilogue,
    check_for_kernels,
    check_for_triton,
    check_ids,
    needs_of,
)
from chorus.kernels.low_rank_cpu import CpuSegments, CpuSite, VectorRows, low_rank_on_cpu
from chorus.kernels.low_rank_tables import Capacity, LowRankTables
from chorus.kernels.types import Epilogue, LowRankSegment, RankPool


class LowRankPlan:
    """How one batch's segments are computed at the sites where they own the same pool rows. Reusable.

    For Triton it holds tables, of fixed size and writable anew with a `capacity`. `triton` says whether Triton runs (on
    CPU tensors only in its interpreter); unless told, it does on CUDA. `tables`, or `on_cpu` on a CPU, are those of the
    segments, where there are some already.

    Raises:
        ValueError: segments overlap, run backwards, name negative pool rows, or, for Triton, rows that are not whole
            pages, or more than the capacity holds.
    """

    def __init__(
        self,
        segments: Sequence[LowRankSegment],
        device: torch.device,
        *,
        triton: bool | None = None,
        capacity: Capacity | None = None,
        tables: LowRankTables | None = None,
        on_cpu: CpuSegments | None = None,
    ) -> None:
        on_triton = runs_triton(device, triton)
        is_cpu = device.type == "cpu" and not on_triton
        self.device = device
        self.needs = needs_of(segments)
        self.segments = tuple(segments)
        self.on_cpu = on_cpu or CpuSegments(self.segments) if is_cpu else None
        self.vector_rows = VectorRows.of(self.segments) if is_cpu else None
        self.tables = None
        if on_triton:
            self.tables = tables or LowRankTables(self.segments, device, capacity)
            self.device = self.tables.buffer.device

    @classmethod
    def together(
        cls, batches: Sequence[Sequence[LowRankSegment]], device: torch.device, *, triton: bool | None = None
    ) -> list["LowRankPlan"]:
        """Plans of several batches, such as all layouts of a step, whose tables go to the device in one upload."""
        if not runs_triton(device, triton):
            return [cls(segments, device, triton=triton) for segments in batches]
        tables = LowRankTables.together(batches, device)
        return [cls(s, device, triton=True, tables=own) for s, own in zip(batches, tables, strict=True)]

    def rewrite(self, segments: Sequence[LowRankSegment]) -> None:
        """Another batch in the same tables, for replays of a CUDA graph. Only of a plan with a capacity."""
        if self.tables is None:
            raise ValueError("capacity: a plan without one is not written anew")
        needs = needs_of(segments)
        self.tables.rewrite(segments)
        self.segments, self.needs = tuple(segments), needs


def low_rank(y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan, epilogue: Epilogue | None = None) -> Tensor:
    """y[t] += act(mid_scale * (x[t] A^T) + mid_bias) B for each row of each segment, and what an epilogue's vectors do.

    The specification is `reference.low_rank`.

    x [T, K], contiguous; y [T, N], changed in place and returned, may be a slice of columns of a wider tensor: its rows
    are contiguous and lie apart. x may be token ids [T], int64, instead.
    Gradients flow into y, x, a and b (`low_rank_backward`), not for token ids, activations or an epilogue.

    Raises:
        ValueError: x, y, pool and epilogue do not fit each other or the plan.
    """
    check(y, x, pool, plan.needs)
    if epilogue is not None or plan.needs.vectors:
        check_epilogue(y, pool, plan.needs, epilogue)
    on_triton = plan.tables is not None and x.dim() == 2 and y.dtype in TRITON_DTYPES
    if on_triton:
        check_for_triton(x, pool, epilogue, plan.device)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, x, *pool, *(epilogue or ()))):
        return _with_gradient(y, x, pool, plan, on_triton, epilogue)
    if on_triton:
        return _on_triton(y, x, pool, plan, epilogue)
    if plan.on_cpu is None or not runs_native(y):
        return reference.low_rank(y, x, pool, plan.segments, epilogue)
    check_for_kernels(pool, epilogue)
    if x.dim() == 1:
        check_ids(x, pool)
    mid_bias = None if epilogue is None else epilogue.mid_bias
    if epilogue is None or plan.vector_rows is None:
        low_rank_on_cpu(x, [CpuSite(y, pool, plan.on_cpu, mid_bias)])
        return y
    delta = torch.zeros_like(y, memory_format=torch.contiguous_format)
    low_rank_on_cpu(x, [CpuSite(delta, pool, plan.on_cpu, mid_bias)])
    plan.vector_rows.finish(y, delta, epilogue)
    return y


def low_rank_group(
    ys: Sequence[Tensor], x: Tensor, pools: Sequence[RankPool | None], plans: Sequence[LowRankPlan | None]
) -> None:
    """`low_rank` at sites that read the same x (q, k, v; gate, up): ys[i] [T, N_i], in place. None: nothing to add.

    What has an epilogue is a call of `low_rank`.

    Raises:
        ValueError: as `low_rank`, or the sequences differ in length, or ys share memory, or, for Triton, pools in rows.
    """
    if not len(ys) == len(pools) == len(plans):
        raise ValueError(f"ys, pools, plans: want as many of each, got {len(ys)}, {len(pools)} and {len(plans)}")
    members = [
        (y, pool, plan) for y, pool, plan in zip(ys, pools, plans, strict=True) if pool is not None and plan is not None
    ]
    if all(_triton_alone(y, x, pool, plan) for y, pool, plan in members):
        _group_on_triton(x, members)
        return
    if all(_cpu_alone(y, x, pool, plan) for y, pool, plan in members):
        _group_on_cpu(x, members)
        return
    for y, pool, plan in members:
        low_rank(y, x, pool, plan)


def _triton_alone(y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan) -> bool:
    """Whether nothing but Triton computes it: no gradients, no specification."""
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *pool))
    return plan.tables is not None and x.dim() == 2 and y.dtype in TRITON_DTYPES and not wants_gradient


def _cpu_alone(y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan) -> bool:
    """The same of the CPU's kernel."""
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *pool))
    return plan.on_cpu is not None and runs_native(y) and x.dim() == 2 and not wants_gradient


def _group_on_cpu(x: Tensor, members: Sequence[tuple[Tensor, RankPool, LowRankPlan]]) -> None:
    for y, pool, plan in members:
        check(y, x, pool, plan.needs)
        check_for_kernels(pool, None)
        if plan.needs.vectors:
            raise ValueError("plans: segments name vectors, which want a call of low_rank with an epilogue")
    check_disjoint([y for y, _, _ in members])
    low_rank_on_cpu(x, [CpuSite(y, pool, plan.on_cpu) for y, pool, plan in members if plan.on_cpu is not None])


def _group_on_triton(x: Tensor, members: Sequence[tuple[Tensor, RankPool, LowRankPlan]]) -> None:
    from chorus.kernels.low_rank_launch import low_rank_group_op  # Triton is not everywhere

    for y, pool, plan in members:
        check(y, x, pool, plan.needs)
        check_for_triton(x, pool, None, plan.device)
        if plan.needs.vectors:
            raise ValueError("plans: segments name vectors, which want a call of low_rank with an epilogue")
    rows = {pool.a.shape[0] for _, pool, _ in members}
    if len(rows) > 1:
        raise ValueError(f"pools: want equally many rows in each, got {sorted(rows)}")
    check_disjoint([y for y, _, _ in members])
    used = [(y, pool, plan.tables) for y, pool, plan in members if plan.tables and plan.tables.geometry.groups]
    if used:
        ys, pools, tables = zip(*used, strict=True)
        geometries = [number for t in tables for number in (len(t.flat_geometry), *t.flat_geometry)]
        low_rank_group_op(ys, x, *map(list, zip(*pools, strict=True)), [t.buffer for t in tables], geometries)


def _on_triton(y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan, epilogue: Epilogue | None) -> Tensor:
    from chorus.kernels.low_rank_launch import low_rank_op  # Triton is not everywhere

    assert plan.tables is not None
    if plan.tables.geometry.groups:
        low_rank_op(y, x, *pool, plan.tables.buffer, plan.tables.flat_geometry, *(epilogue or Epilogue()))
    return y


def _with_gradient(
    y: Tensor, x: Tensor, pool: RankPool, plan: LowRankPlan, on_triton: bool, epilogue: Epilogue | None
) -> Tensor:
    from chorus.kernels.low_rank_backward import LowRankFunction

    if x.dim() == 1:
        raise ValueError("x: token ids have no backward")
    if pool.mid_scale.requires_grad:
        raise ValueError("pool: mid_scale has no backward")
    if epilogue is not None:
        raise ValueError("epilogue: has no backward")
    if any(s.activation for s in plan.segments):
        raise ValueError("segments: activations have no backward")
    if not any(s.acts for s in plan.segments):
        return y
    out: Tensor = LowRankFunction.apply(  # type: ignore[no-untyped-call]
        y, x, *pool, plan.segments, plan.tables if on_triton else None
    )
    return out
