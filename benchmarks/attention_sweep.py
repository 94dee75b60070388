"""`paged_attention` over Llama-3-8B's heads, case by case, for GPUs: decodes, chunks, both; each beside its floor.

A pass calls a contestant on several copies of the caches, past the L2 cache. The contestant is torch's SDPA, which
takes a flash kernel, over keys and values that lie together: what paging costs is in ours alone.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from chorus.kernels import AttentionPlan, AttentionRow, paged_attention
from kernel_cases import PASS_BYTES, AttentionCase, Work
from kernel_timing import Ceilings, seconds

Peer = Callable[[str, Any], Work | None]


class Heads(NamedTuple):
    """Query heads, key heads, their size, tokens of a page."""

    query: int
    key: int
    dim: int
    block: int


LLAMA_8B = Heads(32, 8, 128, 16)


class AttentionSweepCase(NamedTuple):
    """`decodes` rows over `context` tokens each; then, if `chunk`, a chunk of so many new tokens over `prefix`."""

    decodes: int
    context: int
    chunk: int = 0
    prefix: int = 0

    @property
    def name(self) -> str:
        parts = [f"decode {self.decodes} x {self.context}"] if self.decodes else []
        parts += [f"chunk {self.chunk} over {self.prefix}"] if self.chunk else []
        return " and ".join(parts)

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """New tokens and context of each."""
        chunk = [(self.chunk, self.prefix + self.chunk)] if self.chunk else []
        return [(1, self.context)] * self.decodes + chunk

    @property
    def rows(self) -> int:
        return self.decodes + self.chunk

    def bytes(self, heads: Heads) -> int:
        """Keys and values once, queries read, outputs written; two bytes an element."""
        held = sum(context for _, context in self.sequences)
        return 2 * heads.dim * (2 * held * heads.key + 2 * self.rows * heads.query)

    def flops(self, heads: Heads) -> int:
        """Two products for each token and position that it sees."""
        pairs = sum(new * context - new * (new - 1) // 2 for new, context in self.sequences)
        return 4 * pairs * heads.query * heads.dim

    def copies(self, heads: Heads) -> int:
        return max(PASS_BYTES // self.bytes(heads), 1)


def attention_cases() -> Iterator[AttentionSweepCase]:
    """Decodes of one row to a full batch, prefill from nothing and over a prefix, and a step that has both."""
    for decodes, context in ((1, 2048), (16, 1024), (64, 2048), (16, 16384)):
        yield AttentionSweepCase(decodes, context)
    yield AttentionSweepCase(0, 0, 2048, 0)
    yield AttentionSweepCase(0, 0, 2048, 2048)
    yield AttentionSweepCase(64, 2048, 512, 1536)


def inputs_of(
    case: AttentionSweepCase, heads: Heads, device: str, dtype: torch.dtype = torch.bfloat16
) -> AttentionCase:
    """Pages scattered over each copy's cache."""
    torch.manual_seed(0)
    counts = [-(-context // heads.block) for _, context in case.sequences]
    order = torch.randperm(sum(counts)).tolist()
    rows, start = [], 0
    for (new, context), count in zip(case.sequences, counts, strict=True):
        rows.append(AttentionRow(start, start + new, context, [order.pop() for _ in range(count)]))
        start += new

    def cache() -> Tensor:
        return torch.randn(sum(counts), heads.key, heads.block, heads.dim, device=device).to(dtype)

    copies = range(case.copies(heads))
    query = torch.randn(start, heads.query, heads.dim, device=device).to(dtype)
    longest = max(context for _, context in case.sequences)
    return AttentionCase(longest, query, [cache() for _ in copies], [cache() for _ in copies], rows)


def contestants_of(inputs: AttentionCase) -> dict[str, Work]:
    """Ours, and SDPA over dense keys: all decodes in one call, heads of a key head folded together; a chunk alone."""
    query, device = inputs.query, inputs.query.device
    dim, block = query.shape[2], inputs.k_cache[0].shape[2]
    plan = AttentionPlan(inputs.rows, block, device)
    decodes = [row for row in inputs.rows if row.end - row.start == 1]
    chunks = [row for row in inputs.rows if row.end - row.start > 1]
    layers = list(zip(inputs.k_cache, inputs.v_cache, strict=True))
    batches = [rows for rows in (decodes, *([row] for row in chunks)) if rows]
    parts = [query[rows[0].start : rows[-1].end] for rows in batches]
    dense = [[[_dense(cache, rows, device) for cache in layer] for rows in batches] for layer in layers]

    def ours() -> list[Tensor]:
        return [paged_attention(query, k, v, plan, scale=dim**-0.5) for k, v in layers]

    def sdpa() -> list[Tensor]:
        return [torch.cat([_sdpa(part, *kv) for part, kv in zip(parts, layer, strict=True)]) for layer in dense]

    return {"chorus": ours, "SDPA over dense keys": sdpa}


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query [n, H, D] of n decodes, or of the one sequence that key and value [sequences, H_kv, L, D] are of."""
    sequences, kv_heads, context, dim = key.shape
    if sequences == len(query):
        folded = query.view(sequences, kv_heads, -1, dim)
        return F.scaled_dot_product_attention(folded, key, value).view(query.shape)
    seen = causal_lower_right(len(query), context)
    out = F.scaled_dot_product_attention(query.transpose(0, 1)[None], key, value, attn_mask=seen, enable_gqa=True)
    return out[0].transpose(0, 1)


def attention_sweep(
    cases: Iterable[AttentionSweepCase], heads: Heads, ceilings: Ceilings, peers: dict[str, Peer], device: str
) -> Iterator[dict[str, Any]]:
    """A row for each case: seconds a call by contestant, the floor, floor over time of ours."""
    for case in cases:
        inputs = inputs_of(case, heads, device)
        contestants = contestants_of(inputs)
        for name, peer in peers.items():
            if (work := peer("paged_attention", inputs)) is not None:
                contestants[name] = work
        taken = {name: seconds(work, case.rows, device) / case.copies(heads) for name, work in contestants.items()}
        floor = ceilings.floor(case.bytes(heads), case.flops(heads), 1)
        yield {
            "op": "paged_attention",
            "case": case.name,
            "sequences": len(case.sequences),
            "seconds": taken,
            "floor": floor,
            "floor_over_time": floor / taken["chorus"],
        }


def _dense(cache: Tensor, rows: list[AttentionRow], device: torch.device) -> Tensor:
    """[sequences, H_kv, L, D] of sequences of one length."""
    table = torch.tensor([list(row.blocks) for row in rows], device=device)
    pages = cache[table]  # [sequences, pages, H_kv, block, D]
    return pages.transpose(1, 2).flatten(2, 3)[:, :, : rows[0].context].contiguous()
