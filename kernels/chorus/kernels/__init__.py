"""Multi-adapter operators: torch in, torch out; nothing of the server.

One name per operator through specification (`reference`), implementation, test and benchmark.
"""

from chorus.kernels.low_rank import LowRankPlan, low_rank, low_rank_group
from chorus.kernels.paged_attention import AttentionPlan, paged_attention, store_kv
from chorus.kernels.types import AttentionRow, LowRankSegment, RankPool

__all__ = [
    "AttentionPlan",
    "AttentionRow",
    "LowRankPlan",
    "LowRankSegment",
    "RankPool",
    "low_rank",
    "low_rank_group",
    "paged_attention",
    "store_kv",
]
