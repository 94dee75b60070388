"""The check of qk_norm_rope_store against float64 math, page by page."""

import torch
from torch import Tensor

from chorus.kernels import Norm, RopePlan, qk_norm_rope_store
from chorus.kernels.types import NormKind
from support.rows import check_close, noise, poisoned_memory

EPS = 1e-6
BLOCK = 4


def angles(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R / 2] in float64, of scattered positions; scaled as yarn does it."""
    positions = torch.randint(5000, (rows, 1), generator=torch.Generator().manual_seed(seed)).double()
    angle = positions * 10000.0 ** -(torch.arange(width // 2).double() * 2 / width)
    return angle.cos() * 1.1, angle.sin() * 1.1


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Each pair as a complex number, times cos + i sin."""
    width = 2 * cos.shape[1]
    turned, rest = x[..., :width], x[..., width:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    z = torch.complex(a, b) * torch.complex(cos, sin)[:, None]
    parts = (z.real, z.imag)
    joined = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat((joined, rest), dim=-1)


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    scale = norm.weight.double().cpu() + (norm.kind == "rms_plus_one")
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * scale


def check(
    rows: int, heads: tuple[int, int], dim: int, width: int, dtype: torch.dtype, *, kind: NormKind | None = None,
    interleaved: bool = False, strided: bool = False, seed: int = 0, device: str = "cpu", triton: bool | None = None,
) -> None:  # fmt: skip
    """Queries and pages within the bound, pages of others untouched, what overflows kept as 0, the same bits again."""
    h, kv = heads
    wide = noise(seed, rows, (h + 2 * kv) * dim + 16).to(dtype)
    wide[0, (h + kv) * dim] = float("nan")  # a value
    wide[0, (h + kv) * dim + 1] = float("-inf")
    if dtype is not torch.float16:
        wide[-1, -17] = 2e30
    flat = wide[:, : (h + 2 * kv) * dim]
    qkv = (wide.to(device)[:, : flat.shape[1]] if strided else flat.to(device).contiguous()).view(rows, h + 2 * kv, dim)
    cos, sin = (t.to(dtype) for t in angles(rows, width, seed))
    q_norm, k_norm = (
        None if kind is None else Norm(kind, (noise(seed + i, dim) / 4 + 1).to(dtype).to(device), EPS) for i in (1, 2)
    )
    blocks = rows // BLOCK + 3
    slots = torch.randperm(blocks * BLOCK, generator=torch.Generator().manual_seed(seed))[:rows]
    start = noise(seed + 3, 2, blocks, kv, BLOCK, dim).to(dtype)
    outcomes = []
    for _ in range(2):
        k_cache, v_cache = start.to(device, copy=True)
        plan = RopePlan(cos.to(device), sin.to(device), slots.to(device), interleaved=interleaved, triton=triton)
        with poisoned_memory():
            query = qk_norm_rope_store(qkv, k_cache, v_cache, plan, q_norm=q_norm, k_norm=k_norm)
        assert query.is_contiguous()
        outcomes.append([t.cpu() for t in (query, k_cache, v_cache)])
    query, k_cache, v_cache = outcomes[0]
    exact_q, exact_k, exact_v = flat.double().view(rows, -1, dim).split((h, kv, kv), dim=1)
    spun = [
        turn(normed(x, n), cos.double(), sin.double(), interleaved) for x, n in ((exact_q, q_norm), (exact_k, k_norm))
    ]
    exact_v = torch.where(exact_v.abs() <= 1e30, exact_v, 0)
    check_close(query, spun[0], dtype)
    stored = start.double()
    for t, slot in enumerate(slots.tolist()):
        stored[:, slot // BLOCK, :, slot % BLOCK] = torch.stack((spun[1][t], exact_v[t]))
    check_close(k_cache, stored[0], dtype)
    assert torch.equal(v_cache.double(), stored[1])
    mine = torch.zeros(blocks * BLOCK, dtype=torch.bool)
    mine[slots] = True
    others = ~mine.view(blocks, BLOCK)
    assert torch.equal(k_cache.transpose(1, 2)[others], start[0].transpose(1, 2)[others])
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))
