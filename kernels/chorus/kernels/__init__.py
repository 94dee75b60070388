"""Multi-adapter operators: torch in, torch out; nothing of the server.

One name per operator through specification (`reference`), implementation, test and benchmark.
"""

from chorus.kernels.low_rank import LowRankPlan, low_rank, low_rank_group
from chorus.kernels.paged_attention import AttentionPlan, paged_attention, store_kv
from chorus.kernels.row_ops import row_add, row_scale, row_select
from chorus.kernels.row_plan import RowPlan
from chorus.kernels.types import AttentionRow, LowRankSegment, RankPool, SlotSegment

__all__ = [
    "AttentionPlan",
    "AttentionRow",
    "LowRankPlan",
    "LowRankSegment",
    "RankPool",
    "RowPlan",
    "SlotSegment",
    "low_rank",
    "low_rank_group",
    "paged_attention",
    "row_add",
    "row_scale",
    "row_select",
    "store_kv",
]
