"""The cases of `kernels.py`: inputs that rotate past the caches, and the contestants that compute them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus.kernels import (
    AttentionPlan,
    AttentionRow,
    LowRankCapacity,
    LowRankPlan,
    LowRankSegment,
    RankPool,
    low_rank_group,
    paged_attention,
)
from chorus.kernels.tuning import Family
from common import SHAPE_144M, peer_dtype

ROWS, RANK = 16, 16
LAYERS = SHAPE_144M["num_hidden_layers"]
HEADS, KV_HEADS, DIM, BLOCK = 16, 4, 64, 16
# What a pass reads at least, where inputs are copied to get there: five times an H200's 50 MB of L2.
PASS_BYTES = 2**28

Work = Callable[[], object]
# Sites that read the same x [T, K]: K, and the N of each.
Group = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class LowRankCase:
    """Deltas, site by site: x [T, K], base weight [N, K], pool a [R, K], b [R, N], y [T, N].

    `groups` has first and end of the sites that read the same x. Adapter i has the rows and pool rows of segment i.
    """

    x: list[Tensor]
    weight: list[Tensor]
    pool: list[RankPool]
    y: list[Tensor]
    segments: list[LowRankSegment]
    groups: list[tuple[int, int]]

    @property
    def bytes(self) -> int:
        """Adapters' weights once, x read, y read and written."""
        pools = sum(pool.a.nbytes + pool.b.nbytes for pool in self.pool)
        inputs = {id(x): x.nbytes for x in self.x}
        return pools + sum(inputs.values()) + sum(2 * y.nbytes for y in self.y)


@dataclass(frozen=True)
class AttentionCase:
    """A batch of `rows`, up to `context` tokens each: query [T, H, D], caches [blocks, H_kv, B, D] of each layer."""

    context: int
    query: Tensor
    k_cache: list[Tensor]
    v_cache: list[Tensor]
    rows: list[AttentionRow]

    @property
    def bytes(self) -> int:
        """Every key and value once."""
        held = sum(row.context for row in self.rows) * self.k_cache[0].shape[1] * self.k_cache[0].shape[3]
        return 2 * held * self.query.element_size() * len(self.k_cache)


def layer_groups(hidden: int, kv: int, ffn: int) -> tuple[Group, ...]:
    """A Llama layer's seven linears: q, k, v; o; gate, up; down."""
    return (hidden, (hidden, kv, kv)), (hidden, (hidden,)), (hidden, (ffn, ffn)), (ffn, (hidden,))


def step_groups() -> list[Group]:
    """All linears of the 144M shape."""
    layer = layer_groups(SHAPE_144M["hidden_size"], KV_HEADS * DIM, SHAPE_144M["intermediate_size"])
    return [group for _ in range(LAYERS) for group in layer]


def low_rank_case(
    device: str, groups: Sequence[Group], rows: int, ranks: Sequence[int], dtype: torch.dtype = torch.bfloat16
) -> LowRankCase:
    """An adapter for each of the ranks, multiples of 8; the rows are shared out among them evenly.

    Raises:
        ValueError: they can not be.
    """
    torch.manual_seed(0)
    total, each = sum(ranks), rows // len(ranks)
    if each * len(ranks) != rows:
        raise ValueError(f"rows: {rows} are not shared out evenly among {len(ranks)} adapters")

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    sites = [(k, n) for k, ns in groups for n in ns]
    ends = [sum(len(ns) for _, ns in groups[: i + 1]) for i in range(len(groups))]
    firsts = [sum(ranks[:i]) for i in range(len(ranks))]
    scale = torch.full((total,), 0.5, device=device)
    return LowRankCase(
        x=[x for k, ns in groups for x in [random(rows, k)] * len(ns)],
        weight=list(_weights(sites, random)),
        pool=[RankPool(random(total, k), random(total, n), scale) for k, n in sites],
        y=[random(rows, n) for _, n in sites],
        segments=[
            LowRankSegment(i * each, (i + 1) * each, tuple(range(first, first + rank)))
            for i, (first, rank) in enumerate(zip(firsts, ranks, strict=True))
        ],
        groups=[(end - len(ns), end) for (_, ns), end in zip(groups, ends, strict=True)],
    )


def _weights(sites: Sequence[tuple[int, int]], random: Callable[[int, int], Tensor]) -> Iterator[Tensor]:
    """A base weight for each site; those of a shape come round again once a pass over them is past the caches.

    A single row's adapters are so small that their pass has 900 sites; as many weights would not fit on a GPU.
    """
    made: dict[tuple[int, int], list[Tensor]] = {}
    used: dict[tuple[int, int], int] = {}
    for k, n in sites:
        same, turn = made.setdefault((k, n), []), used.get((k, n), 0)
        if len(same) * 2 * k * n < PASS_BYTES:
            same.append(random(n, k))
        yield same[turn % len(same)]
        used[k, n] = turn + 1


def with_plan(case: LowRankCase, plan: LowRankPlan) -> Work:
    """Adds the deltas to y by our operator."""
    sites = [(case.y[a:b], case.x[a], case.pool[a:b], [plan] * (b - a)) for a, b in case.groups]

    def ours() -> None:
        for ys, x, pools, plans in sites:
            low_rank_group(ys, x, pools, plans)

    return ours


def static_contestants(case: LowRankCase) -> dict[str, Work]:
    """Ours as a CUDA graph of decodes has it, in tables for any batch of as many rows: each family that may serve."""
    rows, rank = case.x[0].shape[0], max(len(s.pool_rows) for s in case.segments)
    found = {}
    for family in (Family.SMALL, Family.GROUPED, Family.SLOTS):
        capacity = LowRankCapacity(rows, rank, family)
        plan = LowRankPlan(case.segments, case.x[0].device, capacity=capacity)
        found[f"static {family.name.lower()}"] = with_plan(case, plan)
    return found


def low_rank_contestants(case: LowRankCase) -> dict[str, Work]:
    """Ours, a loop, a bmm, and one GEMM over all adapters' rank rows, each of which adds the deltas to y; the base
    linears, for scale. Others have the dtype that is best for them."""
    count, widest = len(case.segments), max(len(s.pool_rows) for s in case.segments)
    dtype = peer_dtype(case.x[0].device.type, case.x[0].dtype)
    xs = [x.to(dtype) for x in case.x]
    linears = [(x, weight.to(dtype)) for x, weight in zip(xs, case.weight, strict=True)]
    pools = [(pool.a.to(dtype), pool.b.to(dtype)) for pool in case.pool]
    ys = [y.to(dtype) for y in case.y]
    own = _own_lanes(case.segments, pools[0][0])
    padded = [[_padded(table, case.segments, widest) for table in pool] for pool in pools]

    def base() -> None:
        for x, weight in linears:
            F.linear(x, weight)

    def loop() -> None:
        for y, x, (a, b) in zip(ys, xs, pools, strict=True):
            for s in case.segments:
                part = slice(s.pool_rows[0], s.pool_rows[-1] + 1)
                y[s.start : s.end] += (x[s.start : s.end] @ a[part].T) @ b[part] * 0.5

    def bmm() -> None:
        for y, x, (a, b) in zip(ys, xs, padded, strict=True):
            middle = torch.bmm(x.view(count, -1, x.shape[1]), a.transpose(1, 2))
            y.add_(torch.bmm(middle, b).view(y.shape), alpha=0.5)

    def slots() -> None:
        for y, x, (a, b) in zip(ys, xs, pools, strict=True):
            y.addmm_((x @ a.T).mul_(own), b, alpha=0.5)

    return {
        "chorus": with_plan(case, LowRankPlan(case.segments, case.x[0].device)),
        "base linears": base,
        "loop over adapters": loop,
        "padded bmm": bmm,
        "all slots in one GEMM": slots,
    }


def _own_lanes(segments: Sequence[LowRankSegment], table: Tensor) -> Tensor:
    """[T, R], 1 where a pool row is one of the batch row's adapter."""
    own = table.new_zeros(segments[-1].end, table.shape[0])
    for s in segments:
        own[s.start : s.end, s.pool_rows[0] : s.pool_rows[-1] + 1] = 1
    return own


def _padded(table: Tensor, segments: Sequence[LowRankSegment], widest: int) -> Tensor:
    """[adapters, widest, columns]; a view where all ranks are the widest."""
    if all(len(s.pool_rows) == widest for s in segments):
        return table.view(len(segments), widest, -1)
    out = table.new_zeros(len(segments), widest, table.shape[1])
    for i, s in enumerate(segments):
        out[i, : len(s.pool_rows)] = table[list(s.pool_rows)]
    return out


def attention_case(context: int, device: str) -> AttentionCase:
    torch.manual_seed(context)
    each = -(-context // BLOCK)
    blocks = torch.randperm(ROWS * each).view(ROWS, each).tolist()

    def cache() -> Tensor:
        return torch.randn(ROWS * each, KV_HEADS, BLOCK, DIM, device=device).bfloat16()

    return AttentionCase(
        context=context,
        query=torch.randn(ROWS, HEADS, DIM, device=device).bfloat16(),
        k_cache=[cache() for _ in range(LAYERS)],
        v_cache=[cache() for _ in range(LAYERS)],
        rows=[AttentionRow(i, i + 1, context, blocks[i]) for i in range(ROWS)],
    )


def attention_contestants(case: AttentionCase) -> dict[str, Work]:
    device = case.query.device
    plan = AttentionPlan(case.rows, BLOCK, device)
    tables = [torch.tensor(row.blocks, device=device) for row in case.rows]
    # Others have the layout and dtype that suit them best: position-major pages are gathered as rows of a sequence.
    layers, dtype = list(zip(case.k_cache, case.v_cache, strict=True)), peer_dtype(device.type)
    by_position = [tuple(cache.to(dtype).transpose(1, 2).contiguous() for cache in layer) for layer in layers]
    asked = case.query.to(dtype)

    def ours() -> None:
        for k_cache, v_cache in layers:
            paged_attention(case.query, k_cache, v_cache, plan, scale=DIM**-0.5)

    def folded() -> None:
        for caches in by_position:
            for i, table in enumerate(tables):
                key, value = (
                    cache.index_select(0, table).view(1, -1, KV_HEADS, DIM)[:, : case.context].transpose(1, 2)
                    for cache in caches
                )
                query = asked[i].view(1, KV_HEADS, HEADS // KV_HEADS, DIM)
                F.scaled_dot_product_attention(query, key, value)

    return {"chorus": ours, "per-row folded SDPA": folded}
