"""Resource names: `tenants/T/adapters/A`, `...@ALIAS`, `.../versions/DIGEST`.

Ids are ASCII by construction (no homoglyphs, no case, no dots or slashes, no NUL), at most 63 characters, so that they
can be file names and metric labels as they stand. Length is checked before anything else: a name of 10,000 characters
costs nothing and is not echoed.
"""

import re
from dataclasses import dataclass, replace

from chorus.adapters.strict_json import quote
from chorus.errors import InvalidArgument

ID_PATTERN = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
NAME_LIMIT = 256
"""Characters of a whole name; the longest valid one has 218."""
LIVE = "live"

_ID = re.compile(ID_PATTERN)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(
    rf"tenants/(?P<tenant>{ID_PATTERN})/adapters/(?P<adapter>{ID_PATTERN})"
    rf"(?:@(?P<alias>{ID_PATTERN})|/versions/(?P<digest>[0-9a-f]{{64}}))?"
)


@dataclass(frozen=True, slots=True)
class AdapterName:
    """A tenant's adapter; with `alias` or `digest` (never both), one of its versions. `str()` is the resource name."""

    tenant: str
    adapter: str
    alias: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        name = f"tenants/{self.tenant}/adapters/{self.adapter}"
        if self.digest:
            return f"{name}/versions/{self.digest}"
        return f"{name}@{self.alias}" if self.alias else name

    @property
    def bare(self) -> "AdapterName":
        """The adapter itself, without alias or version."""
        return AdapterName(self.tenant, self.adapter)

    def version(self, digest: str) -> "AdapterName":
        """The name of one version of this adapter."""
        return replace(self, alias=None, digest=digest)


def parse_name(text: str, field: str = "adapter") -> AdapterName:
    """Parses a name in any of its three forms.

    Raises:
        InvalidArgument: with `field` as the violation's path.
    """
    found = _NAME.fullmatch(text) if len(text) <= NAME_LIMIT else None
    if not found:
        forms = "tenants/T/adapters/A, tenants/T/adapters/A@ALIAS or tenants/T/adapters/A/versions/DIGEST"
        raise _invalid(field, text, f"expected {forms}")
    return AdapterName(**{part: found[part] for part in ("tenant", "adapter", "alias", "digest")})


def parse_adapter_name(text: str, field: str = "name") -> AdapterName:
    """Parses `tenants/T/adapters/A`, without alias or version.

    Raises:
        InvalidArgument
    """
    name = parse_name(text, field)
    if name != name.bare:
        raise _invalid(field, text, "expected tenants/T/adapters/A, without alias or version")
    return name


def parse_version_name(text: str, field: str = "name") -> AdapterName:
    """Parses `tenants/T/adapters/A/versions/DIGEST`.

    Raises:
        InvalidArgument
    """
    name = parse_name(text, field)
    if name.digest is None:
        raise _invalid(field, text, "expected tenants/T/adapters/A/versions/DIGEST")
    return name


def parse_tenant_name(text: str, field: str = "parent") -> str:
    """The tenant's id in `tenants/T`.

    Raises:
        InvalidArgument
    """
    prefix, _, tenant = text[: NAME_LIMIT + 1].partition("/")
    if prefix != "tenants" or not _ID.fullmatch(tenant):
        raise _invalid(field, text, "expected tenants/T")
    return tenant


def check_id(text: str, field: str) -> str:
    """Gives back an id (tenant, adapter or alias).

    Raises:
        InvalidArgument
    """
    if len(text) > 63 or not _ID.fullmatch(text):
        raise _invalid(field, text, f"expected {ID_PATTERN}")
    return text


def check_digest(text: str, field: str = "digest") -> str:
    """Gives back a version digest.

    Raises:
        InvalidArgument
    """
    if len(text) != 64 or not _DIGEST.fullmatch(text):
        raise _invalid(field, text, "expected 64 lower-case hex digits")
    return text


def _invalid(field: str, text: str, expected: str) -> InvalidArgument:
    return InvalidArgument(f"{field}: {quote(text)} is not valid: {expected}", reason="INVALID_NAME", field=field)
