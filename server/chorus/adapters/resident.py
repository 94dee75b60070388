"""What is known of a version while it is in memory, and of a load that ended."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from chorus.adapters.host_cache import HostCopy
from chorus.adapters.lowered import LoweredAdapter
from chorus.errors import ChorusError


class Tier(Enum):
    LOADING = "loading"
    HOST = "host"
    DEVICE = "device"


class LoadedHost(NamedTuple):
    """What a loader thread gives: the adapter in host memory, and how long each of its stages took."""

    adapter: LoweredAdapter
    seconds_by_stage: tuple[tuple[str, float], ...] = ()


class Counts(NamedTuple):
    """Versions on the device; in host memory, where those on the device may be too; pinned ones wherever they are."""

    device: int
    host: int
    pinned: int


class LoadOutcome(NamedTuple):
    """A load that ended: `error` is None when the version is on the device."""

    digest: str
    error: ChorusError | None
    seconds_by_stage: tuple[tuple[str, float], ...]


@dataclass(slots=True)
class Resident:
    """One version in memory."""

    digest: str
    path: str
    loading: Future[LoadedHost] | None = None
    host: HostCopy | None = None
    slot: int | None = None
    refs: int = 0
    unwanted: bool = False
    hits: int = 0
    last_used: int = 0
    wanted_at: int = 0
    kind: str = ""
    max_rank: int = 0
    rank_rows: int = 0
    bytes: int = 0
    seconds: list[tuple[str, float]] = field(default_factory=list)

    @property
    def tier(self) -> Tier:
        return Tier.DEVICE if self.slot is not None else Tier.HOST if self.host else Tier.LOADING
