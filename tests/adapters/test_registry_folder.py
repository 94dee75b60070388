"""The registry's folder: what was acknowledged is there after a restart, whatever disk, files and threads do."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from chorus.adapters.names import AdapterName
from chorus.adapters.registry import Registry
from chorus.errors import DataLoss, ResourceExhausted, Unavailable
from support.registries import D1, D2, D3, A, B, reopened, version


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
