"""Which adapter versions are in memory, on their way in, or on their way out.

    request ──> loading ──(loader thread: read, validate, lower)──> host ──(step thread: copy)──> device ──> evicted
       │           └── failed: whoever waits is told                 │└── waits here while the device has no room
       └─────────────────── has a copy in host memory ───────────────┘            (`host_cache`)

The step thread calls everything here; loader threads run `load` and nothing else. References are running requests; pins
are the operator's. What has neither may be evicted, the least recently used first. Whoever waits for room is served in
order; when the first has waited long because all that is resident stays in use, the longest resident yields: it takes
no new references, and leaves with its last one. So every version gets its turn, whatever the others' traffic. What
nobody has asked for in a long time leaves the line. Only the first in line are read: those behind would take host
memory that no budget grants, for as long as the device has no room.
"""

import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from dataclasses import replace
from itertools import islice

from chorus.adapters.host_cache import HostCache, HostCopy
from chorus.adapters.loader_threads import LoaderThreads
from chorus.adapters.pool import AdapterPool
from chorus.adapters.resident import Counts, LoadedHost, LoadOutcome, Resident
from chorus.errors import ChorusError, FailedPrecondition, InternalError, ResourceExhausted

logger = logging.getLogger(__name__)

LOADERS = 2
# Versions that are being loaded or wait in host memory: as many as are read at a time, and as many that are ready. When
# 16 of 6.7 MB came at once, all of them were in host memory before the step thread had copied the first. A step copies
# no more of them, either, however many have copies.
AHEAD = 2 * LOADERS
# Turns that the first in line waits for room before a resident has to yield, and before each further one.
PATIENCE_TURNS = 32
# Turns after which a version that waits for room, and that nobody asks for any more, leaves the line.
FORGET_TURNS = 512
ROOM_RETRY_S = 1.0
# Of host memory, for an adapter's rank and scale at a site: 100 measured, twice that where no other has its recipe.
SITE_BYTES = 256
NO_ADAPTER_ROOM = "NO_ADAPTER_ROOM"


class Residency:
    """Loads, keeps and evicts versions in one device pool.

    `load(digest, path)` runs on a loader thread and returns the adapter, or raises a ChorusError; `on_ready` is
    called when a load has ended, there, or a copy was found, and `advance` has something to do. Versions keep copies in
    host memory, of `host_bytes` together at most, besides those that wait for room. `fresh_turns` keeps a version that
    just arrived from being evicted before the scheduler could take it; `forget_turns` is how long one that waits for
    room stays in line without being asked for.
    """

    def __init__(
        self,
        pool: AdapterPool,
        load: Callable[[str, str], LoadedHost],
        *,
        on_ready: Callable[[], None] = lambda: None,
        host_bytes: int = 0,
        executor: Executor | None = None,
        fresh_turns: int = 2,
        patience_turns: int = PATIENCE_TURNS,
        forget_turns: int = FORGET_TURNS,
    ) -> None:
        self._pool = pool
        self._load = load
        self._on_ready = on_ready
        self._executor = executor or LoaderThreads(LOADERS)
        self._copies = HostCache(host_bytes)
        self._residents: dict[str, Resident] = {}
        # Those without a slot in order of request, and those with one by slot: while there is room for all who ask, a
        # turn looks at nobody who only lies there.
        self._in_line: dict[str, Resident] = {}
        self._on_device: dict[int, Resident] = {}
        self._pinned: set[str] = set()
        self._yielding: set[str] = set()
        self._turn = 0
        self._fresh_turns = fresh_turns
        self._patience_turns = patience_turns
        self._forget_turns = forget_turns
        self._turns_without_room = 0
        self.evictions = 0
        self.hits = 0
        """Requests that found their version on the device."""
        self.loads_from_disk = 0
        """Versions that came to the device from there; so `loads_from_host`."""
        self.loads_from_host = 0

    @property
    def host_evictions(self) -> int:
        """Copies in host memory that had to make room."""
        return self._copies.evictions

    def request(self, digest: str, path: str) -> Resident:
        """Puts a version in line to be loaded unless it is in memory or on its way."""
        resident = self._residents.get(digest)
        if resident is None:
            resident = self._residents[digest] = self._in_line[digest] = Resident(digest, path)
            if digest in self._copies:
                self._on_ready()
            else:
                self._start_loads()
        if resident.slot is None:
            self._copies.touch(digest)  # it is the last that shall go
        resident.unwanted = False
        resident.wanted_at = self._turn
        return resident

    def acquire(self, digest: str, path: str) -> int | None:
        """The version's slot, with a reference taken; None while it is not there (its load is under way) or yields."""
        resident = self.request(digest, path)
        if resident.slot is None or digest in self._yielding:
            return None
        resident.refs += 1
        resident.last_used = self._turn
        return resident.slot

    def count_start(self, digest: str, *, waited: bool) -> None:
        """A request has started on a version; a hit if it did not have to wait for it."""
        self._residents[digest].hits += 1
        self.hits += not waited

    def release(self, digest: str) -> None:
        """Gives one reference back."""
        resident = self._residents[digest]
        if resident.refs <= 0:
            raise RuntimeError(f"release without acquire: {digest}")
        resident.refs -= 1
        resident.last_used = self._turn
        if resident.unwanted and resident.refs == 0:
            self._drop(resident)

    def pin(self, digest: str, path: str) -> None:
        self.request(digest, path)
        self._pinned.add(digest)

    def unpin(self, digest: str) -> None:
        self._pinned.discard(digest)

    def unload(self, digest: str) -> None:
        """Forgets a version; one that requests hold stays until the last is done."""
        self._copies.drop(digest)
        resident = self._residents.get(digest)
        if resident is None:
            return
        self._pinned.discard(digest)
        resident.unwanted = True
        if resident.refs == 0:
            self._drop(resident)

    def advance(self) -> list[LoadOutcome]:
        """Once a step: takes over what loaders finished and copies a few to the device, as far as there is room."""
        self._turn += 1
        outcomes = []
        room, left = True, AHEAD
        for resident in list(self._in_line.values()):
            try:
                if not self._is_ready(resident) or not room or not left:
                    continue
                room = self._to_device(resident)
                left -= room
                if room:
                    outcomes.append(LoadOutcome(resident.digest, None, tuple(resident.seconds)))
            except ChorusError as error:
                self._drop(resident)
                outcomes.append(LoadOutcome(resident.digest, error, tuple(resident.seconds)))
        if not left:
            self._on_ready()  # more may be ready, and have room
        outcomes += self._forget()
        self._start_loads()
        self._make_yield(has_room=room)
        return outcomes

    def on_device(self, digest: str) -> bool:
        resident = self._residents.get(digest)
        return resident is not None and resident.slot is not None

    def wait(self, timeout: float) -> None:
        """Sleeps until a load under way has ended, at most `timeout` seconds; for callers without `on_ready`."""
        wait([r.loading for r in self._in_line.values() if r.loading], timeout, return_when=FIRST_COMPLETED)

    def residents(self) -> list[Resident]:
        """All versions in memory or on their way, each once; those that only have a copy come last."""
        residents = dict(self._residents)
        for digest, copy in self._copies.items():
            resident = residents.get(digest) or Resident(digest, copy.path)
            if resident.slot is None and resident.host is None:
                residents[digest] = _with(replace(resident), copy)
        return list(residents.values())

    def is_pinned(self, digest: str) -> bool:
        """Whether the operator keeps a version that is here."""
        return digest in self._pinned

    @property
    def has_line(self) -> bool:
        """Whether a version is on its way to the device, or waits for room."""
        return bool(self._in_line)

    @property
    def counts(self) -> Counts:
        """How many versions are where."""
        waiting = sum(r.host is not None for r in self._in_line.values())
        return Counts(len(self._on_device), len(self._copies) + waiting, len(self._pinned))

    def kinds_of(self, slots: set[int]) -> int:
        """How many different adapter kinds the given slots hold."""
        return len({self._on_device[slot].kind for slot in slots if slot in self._on_device})

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def check_integrity(self) -> None:
        """Raises AssertionError when pages and residents do not add up."""
        on_device = [r for r in self._residents.values() if r.slot is not None]
        assert {r.slot: r for r in on_device} == self._on_device, "a slot is lost, or somebody else's"
        assert {r.digest for r in self._residents.values() if r.slot is None} == self._in_line.keys(), "lost in line"
        assert self._pinned | self._yielding <= self._residents.keys(), "pinned or yielding, and not there"
        self._pool.check_integrity()
        self._copies.check_integrity()
        assert sum(r.rank_rows for r in on_device) == self._pool.rows_used, "rank rows leaked or shared"
        assert all(r.refs >= 0 and r.host is None and r.loading is None for r in on_device), "negative or held twice"
        for resident in self._in_line.values():
            held = (resident.host is not None, resident.loading is not None, resident.digest in self._copies)
            assert sum(held) <= 1, "held twice, or loaded for nothing"

    def _start_loads(self) -> None:
        """Has the first in line read, of those that have no copy."""
        for resident in islice((r for r in self._in_line.values() if r.digest not in self._copies), AHEAD):
            if resident.loading is None and resident.host is None:
                resident.loading = self._executor.submit(self._load, resident.digest, resident.path)
                resident.loading.add_done_callback(lambda _: self._on_ready())

    def _is_ready(self, resident: Resident) -> bool:
        """True once it is in host memory, because a loader is done with it or as a copy."""
        if resident.loading is None:
            return resident.host is not None or resident.digest in self._copies
        if not resident.loading.done():
            return False
        future, resident.loading = resident.loading, None
        try:
            adapter, stages = future.result()
        except ChorusError:
            raise
        except Exception as error:
            incident = uuid.uuid4().hex[:12]
            logger.error("adapter %s could not be loaded, incident %s", resident.digest, incident, exc_info=error)
            raise InternalError(f"adapter {resident.digest[:12]} could not be loaded; incident {incident}") from error
        resident.seconds += stages
        size = adapter.bytes
        held = size + SITE_BYTES * adapter.site_count
        _with(resident, HostCopy(adapter, resident.path, self._pool.rows_of(adapter), size, held))
        if site := self._pool.too_large(adapter):
            raise FailedPrecondition(
                f"adapter {resident.digest[:12]} needs more rank rows at {site} than the whole pool has; "
                "raise --adapter-memory-mb",
                reason="ADAPTER_TOO_LARGE",
            )
        return True

    def _to_device(self, resident: Resident) -> bool:
        """True once it is on the device; evicts what nobody uses to make room."""
        copy = resident.host or self._copies.get(resident.digest)
        assert copy is not None
        began = time.monotonic()
        while (slot := self._pool.load(copy.adapter)) is None:
            victim = self._victim()
            if victim is None:
                return False
            self._drop(victim)
            self.evictions += 1
        self.loads_from_host += resident.host is None
        self.loads_from_disk += resident.host is not None
        self._copies.keep(resident.digest, copy)
        _with(resident, copy)
        resident.slot, resident.host, resident.last_used = slot, None, self._turn
        self._on_device[slot] = self._in_line.pop(resident.digest)
        resident.seconds.append(("device", time.monotonic() - began))
        return True

    def _forget(self) -> list[LoadOutcome]:
        """Drops what waits for room and was not asked for in the last `forget_turns` turns; who still waits is told."""
        forgotten = [
            r
            for r in self._in_line.values()
            if r.loading is None and not self.is_pinned(r.digest) and self._turn - r.wanted_at > self._forget_turns
        ]
        outcomes = []
        for resident in forgotten:
            if resident.host is not None:
                self._copies.keep(resident.digest, resident.host)
            self._drop(resident)
            error = ResourceExhausted(
                f"the device had no room for adapter {resident.digest[:12]}; try again",
                reason=NO_ADAPTER_ROOM,
                retry_after_s=ROOM_RETRY_S,
            )
            outcomes.append(LoadOutcome(resident.digest, error, tuple(resident.seconds)))
        return outcomes

    def _make_yield(self, *, has_room: bool) -> None:
        """One resident after the other, the longest there first, while the first in line finds no room."""
        if has_room:
            self._turns_without_room = 0
            self._yielding.clear()
            return
        self._turns_without_room += 1
        if self._turns_without_room % self._patience_turns == 0:
            exempt = self._pinned | self._yielding
            staying = (r for r in self._on_device.values() if r.digest not in exempt)
            if longest := min(staying, key=lambda r: r.slot or 0, default=None):
                self._yielding.add(longest.digest)

    def _victim(self) -> Resident | None:
        candidates = [
            r
            for r in self._on_device.values()
            if r.refs == 0 and not self.is_pinned(r.digest) and self._turn - r.last_used >= self._fresh_turns
        ]
        return min(candidates, key=lambda r: r.last_used, default=None)

    def _drop(self, resident: Resident) -> None:
        """Out of everything, wherever it is."""
        if resident.slot is not None:
            self._pool.evict(resident.slot)
            self._copies.touch(resident.digest)
            del self._on_device[resident.slot]
        else:
            del self._in_line[resident.digest]
        if resident.loading is not None:
            resident.loading.cancel()
        self._pinned.discard(resident.digest)
        self._yielding.discard(resident.digest)
        del self._residents[resident.digest]


def _with(resident: Resident, copy: HostCopy) -> Resident:
    """The same version, in host memory."""
    resident.host = copy
    resident.kind, resident.max_rank = copy.adapter.kind, copy.adapter.max_rank
    resident.rank_rows, resident.bytes = copy.rank_rows, copy.bytes
    return resident
