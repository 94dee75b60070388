"""Digests as people type them: the first characters are enough where they name one version."""

import re
from typing import TYPE_CHECKING

from chorus.errors import NotFound

if TYPE_CHECKING:
    from chorus.client import Client

# What `list` and `residency` show has twelve; fewer than four would be a guess.
_PREFIX = re.compile(r"[0-9a-f]{4,63}")


def whole_digest(client: "Client", adapter: str, digest: str) -> str:
    """Gives the digest of the adapter's version that begins so; what is no beginning of a digest comes back as it is.

    Raises:
        NotFound: none or several begin so.
    """
    if not _PREFIX.fullmatch(digest):
        return digest
    found = [version.digest for version in client.versions(adapter) if version.digest.startswith(digest)]
    if len(found) != 1:
        raise NotFound(
            f"{digest} begins {len(found) or 'no'} digests of {adapter}; "
            f"`chorus adapters versions {adapter}` tells which there are",
            reason="VERSION_NOT_FOUND",
        )
    return found[0]


def whole_name(client: "Client", name: str) -> str:
    """Gives a version's name with its digest whole; any other name as it is."""
    adapter, found, digest = name.partition("/versions/")
    return f"{adapter}/versions/{whole_digest(client, adapter, digest)}" if found else name
