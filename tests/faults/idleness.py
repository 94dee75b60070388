"""What a server has under way, seen from outside."""

from chorus.client import Client
from support.claims import until
from support.scrape import Scrape
from support.server import ServerProcess


def is_idle(server: ServerProcess) -> bool:
    """No request runs or waits, and no page is held."""
    now = server.scrape()
    names = ("requests_running", "requests_waiting", "kv_cache_usage_ratio")
    return all(now.value(f"chorus_{name}") == 0 for name in names)


def held(client: Client) -> int:
    """KV blocks and references to adapters that anybody holds."""
    found = client.residency()
    return found.totals.kv_blocks_used + sum(version.refs for version in found.versions)


def steps_once_heard(server: ServerProcess, client: Client, before: Scrape) -> float:
    """How many steps the engine has made when it hears that a call is over that had no end of its own `before`.

    How long that takes is the network's and the front end's matter; what the engine promises is counted from there.
    """

    def ended(seen: Scrape) -> float:
        return sum(seen.value("chorus_requests_finished_total", reason=reason) for reason in ("aborted", "error"))

    until(lambda: ended(server.scrape()) > ended(before), "the front end hears of it")
    client.residency()  # asked of the engine behind the abort, on the same socket
    return server.scrape().value("chorus_engine_steps_total")
