"""The registry's promises, one by one; `test_registry_machine` checks them in any order, with restarts."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chorus.adapters.names import AdapterName
from chorus.adapters.records import VersionRecord
from chorus.adapters.registry import Registry
from chorus.errors import (
    Aborted,
    ChorusError,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)

A, B = AdapterName("acme", "router"), AdapterName("zeta", "router")
D1, D2, D3 = "1" * 64, "2" * 64, "3" * 64


def version(digest: str, at: float = 1.0, **fields: Any) -> VersionRecord:
    return VersionRecord(digest, "LORA", 8, 1000, 4, at, **fields)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def gone() -> list[str]:
    """Digests whose content nobody needs any more."""
    return []


@pytest.fixture
def registry(tmp_path: Path, gone: list[str]) -> Iterator[Registry]:
    opened = Registry(tmp_path / "registry", on_unreferenced=gone.append, clock=Clock())
    yield opened
    opened.close()


def reopened(registry: Registry, folder: Path) -> Registry:
    registry.close()
    again = Registry(folder / "registry")
    again.close()
    return again


def test_first_version_makes_the_adapter_and_its_alias(registry: Registry) -> None:
    record, created = registry.create_version(A, version(D1), "live")
    assert created
    assert record == registry.get(A)
    assert record.aliases == {"live": D1}
    assert record.versions == (version(D1),)
    assert (record.create_time, record.name) == (101.0, A)


def test_without_an_alias_nothing_is_live(registry: Registry) -> None:
    registry.create_version(A, version(D1), None)
    with pytest.raises(FailedPrecondition) as caught:
        registry.resolve(A)
    assert caught.value.reason == "NO_LIVE_VERSION"
    assert registry.resolve(A.version(D1)).digest == D1


def test_same_content_again_is_not_created_but_moves_the_alias(registry: Registry) -> None:
    registry.create_version(A, version(D1, metrics={"loss": 1.0}), "live")
    registry.create_version(A, version(D2, 2.0), "live")
    record, created = registry.create_version(A, version(D1, 3.0, metrics={"loss": 9.0}), "live")
    assert not created
    assert record.aliases == {"live": D1}
    assert record.version(D1) == version(D1, metrics={"loss": 1.0})


def test_same_request_gets_the_first_answer_and_moves_nothing(registry: Registry) -> None:
    first = registry.create_version(A, version(D1, request_id="r1"), "live")
    assert registry.create_version(A, version(D1, 5.0, request_id="r1"), "live") == first
    registry.create_version(A, version(D2, request_id="r2"), "live")
    record, _ = registry.create_version(A, version(D1, request_id="r1"), "live")
    assert record.aliases == {"live": D2}


def test_request_id_with_other_content_is_refused(registry: Registry) -> None:
    registry.create_version(A, version(D1, request_id="r1"), "live")
    with pytest.raises(InvalidArgument) as caught:
        registry.create_version(A, version(D2, request_id="r1"), "live")
    assert caught.value.reason == "REQUEST_ID_REUSED"
    registry.create_version(B, version(D2, request_id="r1"), "live")


def test_everything_unknown_gets_the_same_answer(registry: Registry) -> None:
    registry.create_version(A, version(D1), "live")
    messages = set()
    for ask in (
        lambda: registry.get(B),
        lambda: registry.resolve(B),
        lambda: registry.hold(B),
        lambda: registry.versions(B),
        lambda: registry.resolve(replace(A, alias="canary")),
        lambda: registry.resolve(A.version(D2)),
        lambda: registry.set_alias(B, "live", D1),
        lambda: registry.set_alias(A, "live", D2),
        lambda: registry.set_pinned(A, D2, True),
        lambda: registry.delete_version(A, D2),
        lambda: registry.delete_adapter(B),
    ):
        with pytest.raises(NotFound) as caught:
            ask()
        messages.add(caught.value.message)
    assert len(messages) == 1


def test_alias_moves_back_and_goes(registry: Registry) -> None:
    registry.create_version(A, version(D1), "live")
    registry.create_version(A, version(D2), "canary")
    assert registry.resolve(replace(A, alias="canary")).digest == D2
    registry.set_alias(A, "live", D2)
    assert registry.resolve(A).digest == D2
    assert registry.set_alias(A, "live", D1).aliases == {"live": D1, "canary": D2}
    assert registry.set_alias(A, "canary", "").aliases == {"live": D1}


def test_etag_changes_with_the_aliases_and_never_comes_back(registry: Registry) -> None:
    etags = [registry.create_version(A, version(D1), "live")[0].etag]
    registry.create_version(A, version(D2), None)
    assert registry.get(A).etag == etags[0]
    for digest in (D2, D1):
        etags.append(registry.set_alias(A, "live", digest, etag=etags[-1]).etag)
    assert len(set(etags)) == 3
    with pytest.raises(Aborted) as caught:
        registry.set_alias(A, "live", D2, etag=etags[0])
    assert caught.value.reason == "STALE_ETAG"
    assert registry.resolve(A).digest == D1


def test_version_under_an_alias_is_not_deleted(registry: Registry, gone: list[str]) -> None:
    registry.create_version(A, version(D1), "live")
    with pytest.raises(FailedPrecondition, match="live"):
        registry.delete_version(A, D1)
    registry.set_alias(A, "live", "")
    registry.delete_version(A, D1)
    assert registry.get(A).versions == ()
    assert gone == [D1]


def test_content_goes_with_its_last_name(registry: Registry, gone: list[str]) -> None:
    registry.create_version(A, version(D1), "live")
    registry.create_version(B, version(D1), None)
    assert registry.names(D1) == (A.version(D1), B.version(D1))
    registry.delete_adapter(A)
    assert gone == []
    registry.delete_version(B, D1)
    assert gone == [D1]
    assert registry.digests() == frozenset()


def test_content_under_a_lease_goes_with_the_last_lease(registry: Registry, gone: list[str]) -> None:
    registry.create_version(A, version(D1), "live")
    found, first = registry.hold(A)
    second = registry.lease(D1)
    assert found.digest == D1
    registry.delete_adapter(A)
    assert gone == []
    first.release()
    first.release()
    assert gone == []
    with second:
        assert gone == []
    assert gone == [D1]


def test_lease_of_an_upload_that_failed_lets_the_content_go(registry: Registry, gone: list[str]) -> None:
    with pytest.raises(InvalidArgument), registry.lease(D1):
        registry.create_version(A, version(D1), "Not An Alias")
    assert gone == [D1]


def test_lease_of_an_upload_that_succeeded_keeps_it(registry: Registry, gone: list[str]) -> None:
    with registry.lease(D1):
        registry.create_version(A, version(D1), "live")
    assert gone == []


def test_callback_that_fails_does_not_fail_the_deletion(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(digest: str) -> None:
        raise OSError("disk")

    registry = Registry(tmp_path / "registry", on_unreferenced=fail)
    registry.create_version(A, version(D1), "live")
    registry.delete_adapter(A)
    assert D1 in caplog.text
    registry.close()


def test_pins(registry: Registry) -> None:
    registry.create_version(A, version(D1), "live")
    registry.create_version(B, version(D1), "live")
    assert registry.set_pinned(A, D1, True).pinned
    assert registry.pinned() == {D1}
    assert not registry.resolve(B).pinned
    assert not registry.set_pinned(A, D1, False).pinned
    assert registry.pinned() == frozenset()


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


def test_reload_is_equal_to_memory(registry: Registry, tmp_path: Path) -> None:
    registry.create_version(A, version(D1, 0.1 + 0.2, metrics={"loss": 1 / 3}, task="t", request_id="é\0"), "live")
    registry.create_version(A, version(D2, 1e308), "canary")
    registry.set_pinned(A, D2, True)
    registry.create_version(AdapterName("lock", "lock"), version(D1), None)
    before = registry.list()
    assert reopened(registry, tmp_path).list() == before


def test_what_could_not_be_read_back_is_never_written(registry: Registry, tmp_path: Path) -> None:
    registry.create_version(A, version(D1), "live")
    before = registry.list()
    for bad in (version(D2, metrics={"loss": float("nan")}), version(D2, request_id="\ud800")):
        with pytest.raises(ValueError, match=r"JSON|encode"):
            registry.create_version(A, bad, "live")
    assert registry.list() == before
    assert reopened(registry, tmp_path).list() == before


def test_full_disk_changes_nothing(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.create_version(A, version(D1), "live")
    before = registry.list()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for change in (
            lambda: registry.create_version(A, version(D2), "live"),
            lambda: registry.create_version(B, version(D2), "live"),
            lambda: registry.set_alias(A, "canary", D1),
            lambda: registry.set_pinned(A, D1, True),
        ):
            with pytest.raises(ResourceExhausted):
                change()
    assert registry.list() == before
    assert registry.digests() == {D1}
    assert reopened(registry, tmp_path).list() == before


def test_second_process_is_kept_out(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        Registry(tmp_path / "registry")
    assert caught.value.reason == "REGISTRY_LOCKED"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"name": 1}'])
def test_damaged_file_stops_the_start_by_name(content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "registry" / "acme"
    folder.mkdir(parents=True)
    (folder / "router.json").write_bytes(content)
    for _ in range(2):  # and does not keep the lock
        with pytest.raises(DataLoss, match=r"acme/router\.json"):
            Registry(tmp_path / "registry")


def test_the_base_of_a_version_is_kept_and_older_files_have_none(registry: Registry, tmp_path: Path) -> None:
    registry.create_version(A, version(D1, base_digest=D3), "live")
    assert reopened(registry, tmp_path).of_other_bases(D2) == {D1}
    path = tmp_path / "registry" / "acme" / "router.json"
    content = json.loads(path.read_bytes())
    del content["versions"][0]["base_digest"]
    path.write_text(json.dumps(content))
    again = reopened(registry, tmp_path)
    assert again.get(A).versions[0].base_digest == ""
    assert again.of_other_bases(D2) == frozenset()


def test_file_under_another_name_stops_the_start(registry: Registry, tmp_path: Path) -> None:
    registry.create_version(A, version(D1), "live")
    os.rename(tmp_path / "registry" / "acme" / "router.json", tmp_path / "registry" / "acme" / "other.json")
    with pytest.raises(DataLoss, match=r"acme/other\.json"):
        reopened(registry, tmp_path)


def test_unacknowledged_change_is_not_there_after_a_restart(registry: Registry, tmp_path: Path) -> None:
    registry.create_version(A, version(D1), "live")
    before = registry.list()
    leftover = tmp_path / "registry" / "acme" / "router.tmp"
    leftover.write_text('{"half')
    assert reopened(registry, tmp_path).list() == before
    assert not leftover.exists()


def test_concurrent_changes_are_all_kept(registry: Registry, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work(tenant: int) -> None:
        try:
            for index in range(10):
                name = AdapterName(f"t{tenant % 2}", "shared")
                digest = f"{tenant * 100 + index:064x}"
                registry.create_version(name, version(digest, index), "live")
                found, lease = registry.hold(name)
                with lease:
                    assert registry.names(found.digest)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(tenant,)) for tenant in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(registry.digests()) == 60
    before = registry.list()
    assert reopened(registry, tmp_path).list() == before


def test_every_refusal_is_a_typed_error(registry: Registry) -> None:
    for bad in ("", "x" * 64, "../" * 20, "\0" * 64):
        with pytest.raises(ChorusError):
            registry.lease(bad)
        with pytest.raises(ChorusError):
            registry.create_version(A, version(bad), None)
        with pytest.raises(ChorusError):
            registry.set_pinned(A, bad, True)
    assert registry.list() == ((), "")
