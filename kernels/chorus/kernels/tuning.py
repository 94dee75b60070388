"""Which kernel family and tile sizes `low_rank` uses: one table, each row with its evidence.

Nothing here has been measured on a GPU yet. A row that says "predicted" is arithmetic about bytes, registers and shared
memory on H200-class hardware (132 SMs, 4.3 TB/s); `compile_report` proves only that each row compiles without spills.

Choices depend on the family and on K, N and dtype of a site, never on how many rows the batch has: a row's sums are
split the same way in every batch that puts it into the same family. Which family a static plan has is another table's
(`low_rank_choice`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch

RANK_BLOCKS = (16, 32, 64)
"""Rank lanes that one program holds; a bf16 dot on CUDA needs at least 16."""


class Family(IntEnum):
    """How the rows of a segment are cut into tiles."""

    ROWS = 0
    """One row a program, multiply and add: adapters that hardly share a row (decode, all distinct)."""
    SMALL = 1
    """16 rows a program, matrix instructions: a few rows an adapter."""
    GROUPED = 2
    """64 rows a program, matrix instructions: prefill."""
    SLOTS = 3
    """16 neighbouring rows a program, whoever's, times the ranks of all adapters among them: static plans."""


@dataclass(frozen=True, slots=True)
class FamilyRule:
    """Segments of up to `rows_up_to` rows (None: any number) are cut into tiles of `block_rows`.

    SLOTS cuts the batch, not segments: no segment's length asks for it (0).
    """

    family: Family
    rows_up_to: int | None
    block_rows: int
    rank_block_up_to: int
    evidence: str


@dataclass(frozen=True, slots=True)
class ShrinkRule:
    """Tiles of the shrink for inputs of up to `k_up_to` columns (None: any) of `itemsize` bytes on `arch` ("": any).

    `vectors` is False for widths that are no multiple of 16: their rows begin anywhere, so they are loaded one by one.
    """

    family: Family
    itemsize: int
    vectors: bool
    arch: str
    k_up_to: int | None
    block_k: int
    split_k: int
    warps: int
    stages: int
    evidence: str


@dataclass(frozen=True, slots=True)
class ExpandRule:
    """Tiles of the expand for outputs of up to `n_up_to` columns (None: any) of `itemsize` bytes, else as above."""

    family: Family
    itemsize: int
    vectors: bool
    arch: str
    n_up_to: int | None
    block_n: int
    warps: int
    stages: int
    evidence: str


@dataclass(frozen=True, slots=True)
class GradientRule:
    """Tiles of the weight gradient: `block_m` rows of the batch at a time, `block_k` columns of x."""

    itemsize: int
    vectors: bool
    block_m: int
    block_k: int
    warps: int
    stages: int
    evidence: str


@dataclass(frozen=True, slots=True)
class FusedRule:
    """One launch in place of two for up to `rows_up_to` rows of the family ROWS and x of up to `k_up_to` columns."""

    rows_up_to: int
    k_up_to: int
    block_k: int
    block_n: int
    warps: int
    stages: int
    evidence: str


FAMILY_RULES = (
    FamilyRule(Family.ROWS, 2, 1, 16, "predicted: A is read once a row; from 3 rows on a 16-row tile reads less"),
    FamilyRule(Family.SMALL, 32, 16, 16, "predicted: up to 2 tiles read A twice, from L2; a 64-row tile is half empty"),
    FamilyRule(Family.GROUPED, None, 64, 64, "predicted: x is read once for ranks up to 64; kernels.md: not 16 rows"),
    FamilyRule(
        Family.SLOTS, 0, 16, 16, "predicted: 8 rows an adapter are 3 adapters a program, in 3 turns; 64 rows, 9"
    ),
)

SLOT_LANES = 64
"""Rank lanes that the shrink of SLOTS takes at a time, of several adapters: 4 of rank 16 in one turn."""

_BYTES = "predicted from bytes a program: "
_FMA = "fp32 is for exactness: it runs on FMA, and larger tiles spill"
_ODD = "odd widths are for small models and tests: larger tiles spill"
SHRINK_RULES = (
    ShrinkRule(Family.ROWS, 2, True, "", 2048, 256, 4, 4, 3, _BYTES + "16 KB of A; 1 row fills 4 SMs, 64 rows all"),
    ShrinkRule(Family.ROWS, 2, True, "", None, 256, 16, 4, 3, _BYTES + "8 KB of A at K 4096, 28 KB at 14336"),
    ShrinkRule(Family.ROWS, 2, False, "", None, 128, 8, 4, 2, _ODD),
    ShrinkRule(Family.ROWS, 4, True, "", None, 128, 8, 4, 2, _FMA),
    ShrinkRule(Family.ROWS, 4, False, "", None, 128, 8, 4, 2, _FMA),
    ShrinkRule(Family.SMALL, 2, True, "", 2048, 128, 4, 4, 3, _BYTES + "8 KB of x and A a stage, 2 in flight"),
    ShrinkRule(Family.SMALL, 2, True, "", None, 256, 8, 4, 3, _BYTES + "16 KB of x and A a stage, 2 in flight"),
    ShrinkRule(Family.SMALL, 2, False, "", None, 64, 8, 4, 2, _ODD),
    ShrinkRule(Family.SMALL, 4, True, "", None, 64, 8, 4, 2, _FMA),
    ShrinkRule(Family.SMALL, 4, False, "", None, 64, 8, 4, 2, _FMA),
    ShrinkRule(Family.GROUPED, 2, True, "hip", None, 64, 1, 4, 2, "64 KB of LDS on gfx942: 16 KB a stage"),
    ShrinkRule(
        Family.GROUPED, 2, True, "", None, 64, 1, 4, 4, _BYTES + "16 KB a stage, 3 in flight; 2048 rows: 32 tiles"
    ),
    ShrinkRule(Family.GROUPED, 2, False, "", None, 32, 1, 8, 2, _ODD),
    ShrinkRule(Family.GROUPED, 4, True, "", None, 32, 1, 8, 2, _FMA),
    ShrinkRule(Family.GROUPED, 4, False, "", None, 32, 1, 8, 2, _FMA),
    ShrinkRule(Family.SLOTS, 2, True, "hip", None, 64, 8, 4, 2, "64 KB of LDS on gfx942: 10 KB a stage"),
    ShrinkRule(
        Family.SLOTS, 2, True, "", None, 128, 8, 4, 3, _BYTES + "20 KB a stage, 2 in flight; 128 rows: 64 blocks"
    ),
    ShrinkRule(Family.SLOTS, 2, False, "", None, 32, 8, 8, 2, _ODD),
    ShrinkRule(Family.SLOTS, 4, True, "", None, 32, 8, 8, 2, _FMA),
    ShrinkRule(Family.SLOTS, 4, False, "", None, 16, 8, 4, 2, _FMA),
)
EXPAND_RULES = (
    ExpandRule(Family.ROWS, 2, True, "", 1024, 128, 4, 2, _BYTES + "4 KB of B; N 1024 is 8 programs a row"),
    ExpandRule(Family.ROWS, 2, True, "", None, 256, 8, 2, _BYTES + "8 KB of B; N 4096 is 16 programs a row"),
    ExpandRule(Family.ROWS, 2, False, "", None, 128, 4, 2, _ODD),
    ExpandRule(Family.ROWS, 4, True, "", None, 128, 4, 2, _FMA),
    ExpandRule(Family.ROWS, 4, False, "", None, 128, 4, 2, _FMA),
    ExpandRule(Family.SMALL, 2, True, "", 1024, 128, 4, 2, _BYTES + "4 KB of B, 4 KB of y"),
    ExpandRule(Family.SMALL, 2, True, "", None, 256, 4, 2, _BYTES + "8 KB of B, 8 KB of y"),
    ExpandRule(Family.SMALL, 2, False, "", None, 128, 4, 2, _ODD),
    ExpandRule(Family.SMALL, 4, True, "", None, 64, 4, 2, _FMA),
    ExpandRule(Family.SMALL, 4, False, "", None, 64, 4, 2, _FMA),
    ExpandRule(Family.GROUPED, 2, True, "", None, 128, 8, 2, _BYTES + "16 KB of y read and written; 4 warps spill"),
    ExpandRule(Family.GROUPED, 2, False, "", None, 64, 8, 2, _ODD),
    ExpandRule(Family.GROUPED, 4, True, "", None, 32, 8, 2, _FMA),
    ExpandRule(Family.GROUPED, 4, False, "", None, 32, 8, 2, _FMA),
    ExpandRule(Family.SLOTS, 2, True, "", None, 256, 4, 2, _BYTES + "8 KB of y, 8 of B an adapter; 3 programs an SM"),
    ExpandRule(Family.SLOTS, 2, False, "", None, 128, 4, 2, _ODD),
    ExpandRule(Family.SLOTS, 4, True, "", None, 64, 4, 2, _FMA),
    ExpandRule(Family.SLOTS, 4, False, "", None, 64, 4, 2, _FMA),
)


GRADIENT_RULES = (
    GradientRule(2, True, 64, 128, 4, 3, _BYTES + "16 KB of x and 4 to 16 KB of s a stage; K 4096 is 32 programs"),
    GradientRule(2, False, 32, 64, 8, 2, _ODD),
    GradientRule(4, True, 32, 32, 8, 2, _FMA),
    GradientRule(4, False, 32, 32, 8, 2, _FMA),
)


FUSED_RULE = FusedRule(
    4, 4096, 512, 512, 8, 2,
    "predicted: a program reads all of A, 128 KB at K 4096 and rank 16, in 1.2 us from L2 (64 bytes a clock and SM); a"
    " launch and its chain of loads less is worth 2 us. At 16 rows and N 4096 that is 17 MB from L2, 3 us: no gain",
)  # fmt: skip


class LowRankTiles(NamedTuple):
    """What the two launches of one family need to know besides the tables."""

    block_k: int
    split_k: int
    shrink_warps: int
    shrink_stages: int
    block_n: int
    expand_warps: int
    expand_stages: int


def family_of(rows: int) -> Family:
    """The family of a segment of `rows` rows."""
    return next(r.family for r in FAMILY_RULES if r.rows_up_to is None or rows <= r.rows_up_to)


def block_rows(family: Family) -> int:
    """Rows of one tile."""
    return FAMILY_RULES[family].block_rows


def rank_block(family: Family, rank: int) -> int:
    """Rank lanes of one program where the largest rank is `rank`."""
    *smaller, largest = rank_blocks(family)
    return next((b for b in smaller if rank <= b), largest)


def expand_lanes(block: int, stages: int, dtype: torch.dtype, *, between: bool) -> tuple[int, int]:
    """Rank lanes that the expand takes at a time of tiles cut at `block`, and its stages.

    With an activation or a bias between the products 64 lanes of 64 rows spill: in float32 on sm80 (464 bytes; 32 lanes
    16 bytes), in bf16 on gfx942 at odd widths; 16 lanes in two stages on sm90 and sm100 in float32 (16 bytes).
    """
    if not between:
        return block, stages
    return (min(block, 16), 1) if dtype.itemsize == 4 else (min(block, 32), stages)


def expand_warps(family: Family, warps: int, *, between: bool) -> int:
    """Warps of an expand that its rule gives `warps`.

    With an activation or a bias between the products, one row a program spills 8 bytes on sm90 (256 columns on 8 warps,
    128 on 4) and on sm100 (128 on 4), and nothing anywhere with 4 for 8 and 8 for 4. SLOTS spills 16 on sm90 and 8 on
    sm100 with 256 columns on 4, nothing anywhere with 8.
    """
    return {4: 8, 8: 4}[warps] if between and family in (Family.ROWS, Family.SLOTS) else warps


def low_rank_tiles(family: Family, k: int, n: int, dtype: torch.dtype, arch: str) -> LowRankTiles:
    """The first rows of the tables that fit; every dtype of 2 or 4 bytes has one.

    Raises:
        ValueError: no kernel is made for the dtype.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype: want float16, bfloat16 or float32, got {dtype}")
    shrinks = (r for r in SHRINK_RULES if _fits(r, family, k, dtype, arch) and (r.k_up_to is None or k <= r.k_up_to))
    expands = (r for r in EXPAND_RULES if _fits(r, family, n, dtype, arch) and (r.n_up_to is None or n <= r.n_up_to))
    shrink, expand = next(shrinks), next(expands)
    return LowRankTiles(
        shrink.block_k, shrink.split_k, shrink.warps, shrink.stages, expand.block_n, expand.warps, expand.stages
    )


def is_fused(family: Family, rows: int, k: int, widths: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether `rows` rows of a family are one launch. Odd widths and float32 are not: nothing is gained for them."""
    rule = FUSED_RULE
    small = family is Family.ROWS and rows <= rule.rows_up_to and k <= rule.k_up_to
    return small and dtype.itemsize == 2 and all(width % 16 == 0 for width in (k, *widths))


def gradient_rule(k: int, dtype: torch.dtype) -> GradientRule:
    """The row for x of `k` columns."""
    return next(r for r in GRADIENT_RULES if r.itemsize == dtype.itemsize and r.vectors == (k % 16 == 0))


def arch_of(device: torch.device) -> str:
    """ "hip" on AMD, "sm90" and the like on NVIDIA, "" elsewhere."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def rank_blocks(family: Family) -> Iterator[int]:
    """Every rank block that `rank_block` gives for the family."""
    return (b for b in RANK_BLOCKS if b <= FAMILY_RULES[family].rank_block_up_to)


def _fits(rule: ShrinkRule | ExpandRule, family: Family, width: int, dtype: torch.dtype, arch: str) -> bool:
    same = rule.family == family and rule.itemsize == dtype.itemsize and rule.vectors == (width % 16 == 0)
    return same and arch.startswith(rule.arch)
