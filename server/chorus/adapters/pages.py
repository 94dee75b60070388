"""Pages of a sorted listing. A token says after which key to go on, so pages survive insertions and deletions."""

import base64
import binascii
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from chorus.errors import InvalidArgument

DEFAULT_SIZE = 100
MAX_SIZE = 1000
_TOKEN_LIMIT = 1024

T = TypeVar("T")
Key = tuple[str, ...] | tuple[float, str]


class Request(NamedTuple):
    """What the caller asked for. `scope` names the listing: a token of one listing is refused by every other."""

    size: int
    token: str
    scope: str


def page(items: Sequence[T], key: Callable[[T], Key], request: Request) -> tuple[tuple[T, ...], str]:
    """One page of `items`, which are sorted by `key`, and the token of the next; "" on the last page.

    A size of 0 means 100, more than 1000 means 1000.

    Raises:
        InvalidArgument: a negative size, or a token that is not this listing's.
    """
    if request.size < 0:
        raise InvalidArgument("page_size: must not be negative", field="page_size")
    size = min(request.size or DEFAULT_SIZE, MAX_SIZE)
    start = 0
    if request.token:
        try:
            start = bisect_right(items, _after(request), key=key)
        except TypeError:
            raise _bad_token() from None
    chosen = tuple(items[start : start + size])
    more = start + size < len(items)
    return chosen, _token(request.scope, key(chosen[-1])) if more else ""


def _token(scope: str, key: Key) -> str:
    return base64.urlsafe_b64encode(json.dumps([scope, *key]).encode()).decode()


def _after(request: Request) -> Key:
    try:
        if len(request.token) > _TOKEN_LIMIT:
            raise ValueError
        scope, *key = json.loads(base64.b64decode(request.token.encode("ascii"), altchars=b"-_", validate=True))
    except (ValueError, TypeError, RecursionError, binascii.Error):
        raise _bad_token() from None
    if scope != request.scope or not all(isinstance(part, str | float | int) for part in key):
        raise _bad_token()
    return tuple(key)


def _bad_token() -> InvalidArgument:
    return InvalidArgument("page_token: not a token of this listing", reason="BAD_PAGE_TOKEN", field="page_token")
