"""The engine without a server, stepped by who calls it."""

from collections.abc import Sequence
from pathlib import Path
from time import sleep

import torch

from chorus.adapters import artifact as artifacts
from chorus.adapters.digest import version_digest
from chorus.config import ServerConfig
from chorus.engine import messages as m
from chorus.engine.assembly import engine_of
from chorus.engine.engine import Engine
from chorus.engine.memory import MemoryPlan, plan_memory
from chorus.models.base import Base, load_base


def alone(config: ServerConfig) -> tuple[Engine, Base, MemoryPlan]:
    """What `chorus serve` would run with this configuration."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    base = load_base(config.model, device=config.device, dtype=config.dtype, load_format=config.load_format)
    memory = plan_memory(base, config)
    return engine_of(base, memory, config), base, memory


def load_adapters(engine: Engine, base: Base, folders: Sequence[Path]) -> tuple[list[m.AdapterRef], list[m.Loaded]]:
    """Puts all of them on the device, to stay; how each load went comes with it."""
    digest = base.facts.digest
    refs = [m.AdapterRef(version_digest(artifacts.read(folder), digest), str(folder)) for folder in folders]
    loaded: list[m.Loaded] = []
    commands = [m.Pin(ref) for ref in refs]
    while len(loaded) < len(refs):
        loaded += [event for event in engine.step(commands).events if isinstance(event, m.Loaded)]
        commands = []
        sleep(0.005)
    return refs, loaded
