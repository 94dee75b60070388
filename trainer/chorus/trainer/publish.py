"""From the export to a running server: one push, and what to type where it fails.

Knows the client. Needs no torch.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from chorus.client import Client
from chorus.errors import InvalidArgument

DEFAULT_ALIAS = "live"


@dataclass(frozen=True, slots=True)
class Destination:
    """A server's admin port `HOST:PORT`, the adapter, and the alias that will point at the new version."""

    admin: str
    tenant: str
    name: str
    alias: str = DEFAULT_ALIAS

    @classmethod
    def parse(cls, admin: str, adapter: str, alias: str = DEFAULT_ALIAS) -> "Destination":
        """From `TENANT/ADAPTER`.

        Raises:
            InvalidArgument: not two names with a slash between, or no port. Known before any work.
        """
        tenant, _, name = adapter.partition("/")
        if not tenant or not name or "/" in name:
            raise InvalidArgument(f"publish: {adapter!r} must look like acme/support", field="publish")
        host, _, port = admin.rpartition(":")
        if not host or not port.isdigit():
            raise InvalidArgument(f"publish: {admin!r} must look like 127.0.0.1:50052", field="publish")
        return cls(admin, tenant, name, alias)

    def command(self, folder: Path) -> str:
        """The command that does the same by hand."""
        words = ["chorus", "adapters", "push", str(folder), "--tenant", self.tenant, "--name", self.name]
        words += ["--admin", self.admin]
        if self.alias != DEFAULT_ALIAS:
            words += ["--alias", self.alias]
        return shlex.join(words)


def publish(folder: Path, destination: Destination) -> str:
    """Pushes an adapter's folder; returns the new version's resource name.

    Raises:
        ChorusError: whatever the server or the way to it reports.
    """
    with Client(None, admin=destination.admin) as client:
        pushed = client.push(folder, tenant=destination.tenant, name=destination.name, alias=destination.alias)
    return pushed.version
