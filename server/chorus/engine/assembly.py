"""An engine as the configuration says."""

from collections.abc import Callable

import torch

from chorus.config import ServerConfig
from chorus.engine.engine import Engine
from chorus.engine.graphs import CudaGraphs, Record
from chorus.engine.memory import MemoryPlan
from chorus.models.base import Base


def engine_of(
    base: Base, memory: MemoryPlan, config: ServerConfig, *, on_ready: Callable[[], None] = lambda: None
) -> Engine:
    """`on_ready` is called from any thread when a load or a check has ended, or a version's copy has been found."""
    return Engine(
        base,
        memory,
        max_rank=config.max_rank,
        max_rows=config.max_rows,
        max_step_tokens=config.max_step_tokens,
        max_queue=config.max_queue,
        prefix_cache=config.prefix_cache == "tenant",
        target_step_s=None if config.target_step_ms is None else config.target_step_ms / 1e3,
        adapter_host_bytes=config.adapter_host_mb * 2**20,
        record=_recorder(base.device) if config.graphs == "auto" else None,
        overlap=base.device.type == "cuda" and config.overlap == "auto",
        on_ready=on_ready,
    )


def _recorder(device: torch.device) -> Record | None:
    if device.type == "cuda":
        return CudaGraphs()
    if device.type == "cpu":
        from chorus.kernels.native.tape import Tapes  # numba is not everywhere

        return Tapes()
    return None
