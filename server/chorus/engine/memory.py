"""How the memory that the operator granted is split: KV blocks and adapter rank rows. Fixed at start.

Imports torch only to plan: the front end, too, knows what a plan is.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chorus.config import ServerConfig
from chorus.engine.cgroup import memory_limit
from chorus.errors import FailedPrecondition

if TYPE_CHECKING:
    from chorus.models.base import Base

BLOCK_SIZE = 16
"""Tokens of a page. Decode attention takes as long with 32, and shares and wastes less with 16."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """`kv_blocks` of `block_size` tokens each; `adapter_rows` rank rows at every site."""

    kv_blocks: int
    block_size: int
    kv_bytes: int
    adapter_rows: int
    context_length: int


def plan_memory(base: "Base", config: ServerConfig) -> MemoryPlan:
    """Splits the configured budgets.

    Raises:
        FailedPrecondition: the KV budget does not hold a single block for two sequences, or both budgets together are
            more than the machine, the container or the device has.
    """
    from chorus.adapters.pool import rows_for_budget

    _refuse_more_than_there_is(config, base.device.type)
    block_bytes = 2 * base.layers * base.kv_heads * base.head_dim * BLOCK_SIZE * base.dtype.itemsize
    blocks = config.kv_cache_mb * 2**20 // block_bytes
    if blocks < 2:
        raise FailedPrecondition(
            f"--kv-cache-mb {config.kv_cache_mb}: {BLOCK_SIZE} tokens of this model take {block_bytes / 2**20:.1f} MiB",
            reason="KV_CACHE_TOO_SMALL",
        )
    return MemoryPlan(
        kv_blocks=blocks,
        block_size=BLOCK_SIZE,
        kv_bytes=blocks * block_bytes,
        adapter_rows=rows_for_budget(base.sites, base.dtype, config.adapter_memory_mb * 2**20),
        context_length=min(base.facts.context_length, blocks * BLOCK_SIZE),
    )


def _refuse_more_than_there_is(config: ServerConfig, device: str) -> None:
    total, where = _total_bytes(device)
    granted = config.kv_cache_mb + config.adapter_memory_mb
    if granted > total // 2**20:
        raise FailedPrecondition(
            f"--kv-cache-mb {config.kv_cache_mb} and --adapter-memory-mb {config.adapter_memory_mb} are more than the "
            f"{total // 2**20:,} MiB of this {where}; grant less",
            reason="NOT_ENOUGH_MEMORY",
        )


def _total_bytes(device: str) -> tuple[int, str]:
    """How much there is, and of what."""
    if device == "cpu":
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = memory_limit()
        return (machine, "machine") if limit is None or limit >= machine else (limit, "container")
    import torch

    return torch.cuda.mem_get_info()[1], "device"
