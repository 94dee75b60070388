"""What a server has under way, seen from outside."""

from chorus.client import Client
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
