"""Names and versions to register, and a clock."""

from pathlib import Path
from typing import Any

from chorus.adapters.names import AdapterName
from chorus.adapters.records import VersionRecord
from chorus.adapters.registry import Registry

A, B = AdapterName("acme", "router"), AdapterName("zeta", "router")
D1, D2, D3 = "1" * 64, "2" * 64, "3" * 64


def version(digest: str, at: float = 1.0, **fields: Any) -> VersionRecord:
    return VersionRecord(digest, "LORA", 8, 1000, 4, at, **fields)


class Clock:
    """A second passes with each look."""

    now = 100.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def reopened(registry: Registry, folder: Path) -> Registry:
    """What a restart finds."""
    registry.close()
    again = Registry(folder / "registry")
    again.close()
    return again
