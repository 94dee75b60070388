"""The registry's promises, one by one: versions, aliases, pins, leases. `test_registry_machine` mixes them freely."""

from dataclasses import replace
from pathlib import Path

import pytest

from chorus.adapters.registry import Registry
from chorus.errors import Aborted, ChorusError, FailedPrecondition, InvalidArgument, NotFound
from support.registries import D1, D2, A, B, version


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


def test_every_refusal_is_a_typed_error(registry: Registry) -> None:
    for bad in ("", "x" * 64, "../" * 20, "\0" * 64):
        with pytest.raises(ChorusError):
            registry.lease(bad)
        with pytest.raises(ChorusError):
            registry.create_version(A, version(bad), None)
        with pytest.raises(ChorusError):
            registry.set_pinned(A, bad, True)
    assert registry.list() == ((), "")
