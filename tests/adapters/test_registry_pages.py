"""The registry's listings, page by page: complete, in order, and only by tokens that they gave."""

from collections.abc import Callable
from typing import Any

import pytest

from chorus.adapters.names import AdapterName
from chorus.adapters.registry import Registry
from chorus.errors import InvalidArgument
from support.registries import D1, D2, D3, A, B, version


def test_pages_go_through_all_adapters_of_a_tenant_in_order(registry: Registry) -> None:
    for index in range(7):
        registry.create_version(AdapterName("acme", f"a{index}"), version(D1), "live")
        registry.create_version(AdapterName("other", f"a{index}"), version(D1), "live")
    names, token, pages = [], "", 0
    while True:
        records, token = registry.list("acme", 3, token)
        names += [record.name.adapter for record in records]
        pages += 1
        if not token:
            break
        if pages == 1:  # what is deleted or added meanwhile does not disturb the order
            registry.delete_adapter(AdapterName("acme", "a2"))
            registry.create_version(AdapterName("acme", "a0-late"), version(D1), None)
    assert names == [f"a{index}" for index in range(7)]
    assert pages == 3
    assert len(registry.list()[0]) == 14
    assert registry.list("nobody") == ((), "")


def test_versions_come_oldest_first_in_pages(registry: Registry) -> None:
    for digest, at in ((D2, 2.0), (D3, 2.0), (D1, 1)):
        registry.create_version(A, version(digest, at), None)
    first, token = registry.versions(A, 2)
    second, end = registry.versions(A, 2, token)
    assert [found.digest for found in first + second] == [D1, D2, D3]
    assert end == ""


@pytest.mark.parametrize("token", ["x", "é", "\0", "e30=", "bnVsbA==", "W10=", "WzFd", "A" * 5000, "=" * 9, "W251bGxd"])
def test_token_that_is_none_is_refused(token: str, registry: Registry) -> None:
    for ask in (lambda: registry.list("acme", 0, token), lambda: registry.versions(A, 0, token)):
        registry.create_version(A, version(D1), "live")
        with pytest.raises(InvalidArgument) as caught:
            ask()
        assert caught.value.violations[0].field == "page_token"


def test_token_of_another_listing_is_refused(registry: Registry) -> None:
    for name in (A, B, AdapterName("acme", "second")):
        for digest in (D1, D2):
            registry.create_version(name, version(digest), None)
    asks: list[Callable[[str], tuple[Any, str]]] = [
        lambda token: registry.list("acme", 1, token),
        lambda token: registry.list(None, 1, token),
        lambda token: registry.versions(A, 1, token),
        lambda token: registry.versions(B, 1, token),
    ]
    tokens = [ask("")[1] for ask in asks]
    for at, ask in enumerate(asks):
        for of, token in enumerate(tokens):
            if at == of:
                ask(token)
            else:
                with pytest.raises(InvalidArgument):
                    ask(token)


def test_page_sizes(registry: Registry) -> None:
    for index in range(101):
        registry.create_version(A, version(f"{index:064x}", index), None)
    assert len(registry.versions(A)[0]) == 100
    assert len(registry.versions(A, 5000)[0]) == 101
    with pytest.raises(InvalidArgument):
        registry.versions(A, -1)
