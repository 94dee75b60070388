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
        FailedPrecondition: the KV budget does not hold a single block for two sequences, or the budgets together are
            more than the machine or the container has, or with a step's memory more than the weights leave of a device.
    """
    from chorus.adapters.pool import rows_for_budget

    _refuse_more_than_there_is(base, config)
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


def step_bytes(base: "Base", config: ServerConfig) -> int:
    """What the largest step has in memory at a time, beside all that lasts, more or less.

    In a layer's MLP for each token two states, the gate, up and their product; then the logits, of prompts that are
    scored for each token, and of each row also in float32 and as weights to draw by. What recorded steps keep is not
    counted: one memory for all of them, as large as the largest needs, which has few tokens.
    """
    inner = max(site.in_features for site in base.sites.values() if not site.is_embedding)
    state = max(site.out_features for site in base.sites.values() if site.is_embedding)
    mlp = config.max_step_tokens * (3 * inner + 2 * state) * base.dtype.itemsize
    scored = max(config.max_step_tokens, config.max_rows) * base.dtype.itemsize
    return mlp + (scored + config.max_rows * 8) * base.facts.vocab_size


def _refuse_more_than_there_is(base: "Base", config: ServerConfig) -> None:
    on_device = (config.kv_cache_mb + config.adapter_memory_mb) * 2**20
    on_host = config.adapter_host_mb * 2**20
    device_flags = f"--kv-cache-mb {config.kv_cache_mb}, --adapter-memory-mb {config.adapter_memory_mb}"
    host_flag = f"--adapter-host-mb {config.adapter_host_mb}"
    if base.device.type == "cpu":
        _refuse(on_device + on_host, f"{device_flags} and {host_flag} are", *_host_bytes())
        return
    step = step_bytes(base, config)
    asked = f"{device_flags} and {step // 2**20:,} MiB for a step of --max-step-tokens and --max-rows are"
    _refuse(on_device + step, asked, _free_device_bytes(), "that the weights leave of this device")
    _refuse(on_host, f"{host_flag} is", *_host_bytes())


def _refuse(needed: int, asked: str, there: int, where: str) -> None:
    if needed > there:
        raise FailedPrecondition(
            f"{asked} more than the {there // 2**20:,} MiB {where}; grant less", reason="NOT_ENOUGH_MEMORY"
        )


def _host_bytes() -> tuple[int, str]:
    """How much there is, and where."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit()
    return (machine, "of this machine") if limit is None or limit >= machine else (limit, "of this container")


def _free_device_bytes() -> int:
    """What the device has free, and what torch holds of it without using it."""
    import torch

    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
