"""Multi-adapter operators: torch in, torch out; nothing of the server.

One name per operator through specification (`reference`), implementation, test and benchmark.
"""

from chorus.kernels.attention_plan import AttentionPlan, is_short
from chorus.kernels.attention_tables import Capacity as AttentionCapacity
from chorus.kernels.attention_tables import decode_ranges
from chorus.kernels.filtered_draw import filtered_draw
from chorus.kernels.head import HeadPlan, head
from chorus.kernels.likeliest import likeliest
from chorus.kernels.low_rank import LowRankPlan, low_rank, low_rank_group
from chorus.kernels.low_rank_choice import capacity_family as low_rank_family
from chorus.kernels.low_rank_static import StaticLowRank
from chorus.kernels.low_rank_tables import Capacity as LowRankCapacity
from chorus.kernels.packed_attention import PackedPlan, packed_attention
from chorus.kernels.packed_linear import PackedWeight
from chorus.kernels.paged_attention import paged_attention, store_kv
from chorus.kernels.position_bias import relative_bias
from chorus.kernels.reference import GatedActivation
from chorus.kernels.residual_norm import residual_norm
from chorus.kernels.rope_store import RopePlan, qk_norm_rope_store
from chorus.kernels.row_ops import row_add, row_scale, row_select
from chorus.kernels.row_plan import RowPlan
from chorus.kernels.silu_mul import gated_mul, gelu_tanh_mul, silu_mul
from chorus.kernels.types import (
    Activation,
    AttentionRow,
    Epilogue,
    HeadPool,
    HeadSegment,
    LowRankSegment,
    Norm,
    RankPool,
    SlotSegment,
)

__all__ = [
    "Activation",
    "AttentionCapacity",
    "AttentionPlan",
    "AttentionRow",
    "Epilogue",
    "GatedActivation",
    "HeadPlan",
    "HeadPool",
    "HeadSegment",
    "LowRankCapacity",
    "LowRankPlan",
    "LowRankSegment",
    "Norm",
    "PackedPlan",
    "PackedWeight",
    "RankPool",
    "RopePlan",
    "RowPlan",
    "SlotSegment",
    "StaticLowRank",
    "decode_ranges",
    "filtered_draw",
    "gated_mul",
    "gelu_tanh_mul",
    "head",
    "is_short",
    "likeliest",
    "low_rank",
    "low_rank_family",
    "low_rank_group",
    "packed_attention",
    "paged_attention",
    "qk_norm_rope_store",
    "relative_bias",
    "residual_norm",
    "row_add",
    "row_scale",
    "row_select",
    "silu_mul",
    "store_kv",
]
