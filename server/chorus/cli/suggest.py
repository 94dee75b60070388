"""A wrong adapter name: which one was probably meant."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING

from chorus.errors import ChorusError, NotFound

if TYPE_CHECKING:
    from chorus.client import Adapter

_LOOK_UP_S = 2.0


@contextmanager
def adapter_suggestions(name: str, adapters: "Callable[..., tuple[Adapter, ...]]") -> Iterator[None]:
    """Adds `did you mean T/A?` to a NotFound about `name`, where `adapters(tenant, timeout=...)` lists one like it."""
    try:
        yield
    except NotFound as error:
        if close := closest(name, adapters):
            raise NotFound(f"{error.message}; did you mean {close}?", reason=error.reason) from None
        raise


def closest(name: str, adapters: "Callable[..., tuple[Adapter, ...]]") -> str | None:
    """Gives the short name that is most like `name` among its tenant's, None where there is none or no answer."""
    from chorus.client import expand

    wanted = expand(name).partition("@")[0].partition("/versions/")[0]
    tenant = wanted.removeprefix("tenants/").partition("/")[0]
    try:
        known = [_short(adapter.name) for adapter in adapters(tenant, timeout=_LOOK_UP_S)]
    except ChorusError:
        return None
    others = [one for one in known if one != _short(wanted)]
    return next(iter(get_close_matches(_short(wanted), others, n=1)), None)


def _short(name: str) -> str:
    return name.removeprefix("tenants/").replace("/adapters/", "/")
