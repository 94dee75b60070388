"""What tests of residency have in common: two sites, versions whose factors are one number, executors."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import torch

from chorus.adapters.lowered import LoweredAdapter
from chorus.adapters.pool import AdapterPool
from chorus.adapters.residency import SITE_BYTES, Residency
from chorus.adapters.resident import LoadedHost, LoadOutcome
from chorus.errors import ChorusError, FailedPrecondition
from chorus.kernels import SlotSegment
from chorus.models.sites import Site
from support.lowered import Factors, of_factors

SITES = {name: Site(name, 4, 6) for name in ("q", "v")}
# What `lowered(8)` takes in float32: A and B at two sites. And what a copy of it is counted as.
BYTES_8 = 2 * 8 * (4 + 6) * 4
COPY_8 = BYTES_8 + 2 * SITE_BYTES


def lowered(rank: int, fill: float = 1.0) -> LoweredAdapter:
    factors = Factors(torch.full((rank, 4), fill), torch.full((rank, 6), fill), 0.5)
    return of_factors({"q": factors, "v": factors})


def make_pool(rows: int = 32) -> AdapterPool:
    return AdapterPool(SITES, rows=rows, device=torch.device("cpu"), dtype=torch.float32)


def load_by_name(digest: str, path: str) -> LoadedHost:
    """Paths are "RANK" or "bad"; factors are all one number, another for each version."""
    if path == "bad":
        raise FailedPrecondition("bad adapter")
    return LoadedHost(lowered(int(path), number_of(digest)), (("host", 0.5),))


def number_of(digest: str) -> float:
    return float(1 + int.from_bytes(digest.encode(), "big") % 251)


def assert_holds(pool: AdapterPool, slot: int, digest: str) -> None:
    """The slot's rows of all sites have the version's numbers."""
    for (segment,), names in pool.layouts([SlotSegment(0, 1, slot)]):
        for name in names:
            a, b, scale = pool.pools[name]
            rows = list(segment.pool_rows)
            assert a[rows].eq(number_of(digest)).all()
            assert b[rows].eq(number_of(digest)).all()
            assert scale[rows].eq(0.5).all()


def settle(residency: Residency) -> list[LoadOutcome]:
    """Advances until no load is under way."""
    outcomes = residency.advance()
    while any(r.loading for r in residency.residents()):
        residency.wait(5)
        outcomes += residency.advance()
    return outcomes


def acquired(residency: Residency, digest: str, path: str = "8") -> int:
    residency.request(digest, path)
    settle(residency)
    slot = residency.acquire(digest, path)
    assert slot is not None
    return slot


def visited(residency: Residency, digest: str, path: str = "8") -> LoadOutcome:
    """Asks for a version until it has come to the device, and leaves it there."""
    residency.request(digest, path)
    outcomes = [outcome for _ in range(4) for outcome in settle(residency)]
    residency.check_integrity()
    (outcome,) = (outcome for outcome in outcomes if outcome.digest == digest)
    return outcome


class Reader:
    """Loads by name, and remembers what it was asked to read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, digest: str, path: str) -> LoadedHost:
        self.read.append(digest)
        return load_by_name(digest, path)


class InlineExecutor(Executor):
    """Runs what is submitted at once, so that a run of the machine can be repeated exactly; or never."""

    is_stuck = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        if self.is_stuck:
            return future
        try:
            future.set_result(fn(*args, **kwargs))
        except ChorusError as error:
            future.set_exception(error)
        return future
