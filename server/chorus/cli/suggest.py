"""A name that the server does not know: what was probably meant, or what there is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING

from chorus.errors import ChorusError, InvalidArgument, NotFound

if TYPE_CHECKING:
    from chorus.client import Adapter

_LOOK_UP_S = 2.0
_SHOWN = 5


@contextmanager
def adapter_suggestions(name: str, adapters: "Callable[..., tuple[Adapter, ...]]") -> Iterator[None]:
    """Adds to an error about `name` what to write instead; `adapters(tenant, timeout=...)` lists a tenant's."""
    try:
        yield
    except NotFound as error:
        if error.reason == "ADAPTER_NOT_FOUND" and (hint := _hint(name, adapters)):
            raise NotFound(f"{error.message}; {hint}", reason=error.reason) from None
        raise
    except InvalidArgument as error:
        if error.reason == "INVALID_NAME" and "/" not in name:
            raise InvalidArgument(f"{error.message}; T/A is short for it", reason=error.reason) from None
        raise


def _hint(name: str, adapters: "Callable[..., tuple[Adapter, ...]]") -> str | None:
    """Says which adapter or alias of its tenant is most like `name`, or else what there is; None without an answer."""
    from chorus.client import expand

    wanted, with_alias, alias = expand(name).partition("@")
    short = _short(wanted.partition("/versions/")[0])
    tenant = short.partition("/")[0]
    try:
        known = {_short(adapter.name): adapter for adapter in adapters(tenant, timeout=_LOOK_UP_S)}
    except ChorusError:
        return None
    if short not in known:
        close = get_close_matches(short, known, n=1)
        return f"did you mean {close[0]}?" if close else _what_there_is(tenant, sorted(known))
    if "/versions/" in wanted:
        return f"`chorus adapters versions {short}` tells which there are"
    aliases = known[short].aliases
    if not with_alias or alias in aliases:
        return None
    return f"{short} has {' and '.join(f'@{one}' for one in sorted(aliases)) or 'no alias'}"


def _what_there_is(tenant: str, known: list[str]) -> str:
    if not known:
        return f"tenant {tenant} has no adapters"
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"tenant {tenant} has {', '.join(known[:_SHOWN])}{more}"


def _short(name: str) -> str:
    return name.removeprefix("tenants/").replace("/adapters/", "/")
