"""Resource names, and the short forms that people type. Checks nothing else: whether a name is valid is the server's
word."""

import re

# An adapter's id pair, then nothing, an alias, or a version.
_SHORT = re.compile(r"(?P<tenant>[^/@]+)/(?P<adapter>[^/@]+)(?P<rest>@[^/@]*|/versions/[^/@]+)?")


def expand(name: str) -> str:
    """Gives the full resource name for `T/A`, `T/A@alias` and `T/A/versions/DIGEST`; any other text as it is."""
    match = _SHORT.fullmatch(name)
    if match is None:
        return name
    return f"{adapter_name(match['tenant'], match['adapter'])}{match['rest'] or ''}"


def tenant_name(tenant: str) -> str:
    """Gives `tenants/T` for `T`; a full name stays as it is."""
    return tenant if tenant.startswith("tenants/") else f"tenants/{tenant}"


def adapter_name(tenant: str, adapter: str) -> str:
    return f"tenants/{tenant}/adapters/{adapter}"


def is_version(name: str) -> bool:
    """Tells a version's resource name from an adapter's."""
    return "/versions/" in name


def adapter_of(version: str) -> str:
    """Gives the adapter's resource name out of a version's."""
    return version.partition("/versions/")[0]


def digest_of(version: str) -> str:
    """Gives the digest out of a version's resource name; a bare digest as it is."""
    return version.rpartition("/")[2]
