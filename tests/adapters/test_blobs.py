"""The blob store: complete or absent, whatever happens in between."""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from chorus.adapters.blobs import BlobStore
from chorus.errors import InvalidArgument, ResourceExhausted

D1, D2 = "ab" * 32, "cd" * 32
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 100_000}


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_put_makes_the_documented_path(store: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "upload"
    source.write_bytes(b"weights")
    path = store.put(D1, {"adapter_model.safetensors": source, "task.json": b"{}"})
    assert path == tmp_path / "blobs" / "sha256" / "ab" / D1 == store.path(D1)
    assert (path / "adapter_model.safetensors").read_bytes() == b"weights"
    assert store.exists(D1)
    assert not store.exists(D2)
    assert everything(tmp_path / "blobs") == {f"sha256/ab/{D1}/adapter_model.safetensors", f"sha256/ab/{D1}/task.json"}


def test_put_twice_keeps_the_first(store: BlobStore) -> None:
    store.put(D1, FILES)
    store.put(D1, {"adapter_config.json": b"other"})
    assert (store.path(D1) / "adapter_config.json").read_bytes() == b"{}"


def test_deleted_blob_is_gone_and_can_come_back(store: BlobStore, tmp_path: Path) -> None:
    store.put(D1, FILES)
    with (store.path(D1) / "adapter_model.safetensors").open("rb") as reader:
        store.delete(D1)
        assert not store.exists(D1)
        store.close()  # waits for the files
        assert everything(tmp_path / "blobs") == set()
        assert len(reader.read()) == 100_000
    store.delete(D1)
    store.put(D1, FILES)
    assert store.exists(D1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("at", ["write", "rename"])
def test_full_disk_is_resource_exhausted_and_leaves_nothing(
    code: int, at: str, store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(D2, FILES)
    before = everything(tmp_path / "blobs")

    def full(*_: Any) -> None:
        raise OSError(code, "full")

    with monkeypatch.context() as patch:
        if at == "write":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(Path, "rename", full)
        with pytest.raises(ResourceExhausted) as caught:
            store.put(D1, FILES)
    assert caught.value.reason == "DISK_FULL"
    assert caught.value.retry_after_s
    assert everything(tmp_path / "blobs") == before
    assert store.put(D1, FILES).is_dir()


def test_other_failure_leaves_nothing_and_stays_itself(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.put(D1, {"a": b"x", "b": tmp_path / "missing"})
    assert everything(tmp_path / "blobs") == set()
    assert not store.exists(D1)


def test_everything_is_synced_before_the_blob_is_visible(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor: int) -> None:
        log.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def watched_rename(self: Path, target: Path) -> Path:
        log.append("rename " + target.name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    store.put(D1, FILES)
    visible = log.index(f"rename {D1}")
    assert {"sync adapter_config.json", "sync adapter_model.safetensors"} <= set(log[:visible])
    assert log[visible + 1 :] == ["sync ab"]


@pytest.mark.parametrize("digest", ["", "../../etc", "AB" * 32, "ab" * 31, "ab" * 32 + "\n", "/" + "a" * 63])
def test_only_digests_become_paths(digest: str, store: BlobStore) -> None:
    for use in (store.path, store.exists, store.delete, lambda bad: store.put(bad, FILES)):
        with pytest.raises(InvalidArgument):
            use(digest)


def test_only_plain_names_become_files(store: BlobStore, tmp_path: Path) -> None:
    for name in ("../escape", "a/b", "", ".", ".."):
        with pytest.raises(ValueError, match="plain file name"):
            store.put(D1, {name: b"x"})
    assert everything(tmp_path) == set()


def test_sweep_removes_leftovers_and_orphans_and_keeps_the_known(store: BlobStore, tmp_path: Path) -> None:
    store.put(D1, FILES)
    store.put(D2, FILES)
    leftover = tmp_path / "blobs" / "tmp" / "crashed"
    leftover.mkdir()
    (leftover / "half").write_bytes(b"x")
    (tmp_path / "blobs" / "tmp" / "file").write_bytes(b"x")

    again = BlobStore(tmp_path / "blobs")
    assert again.sweep({D1}) == (D2,)

    assert again.exists(D1)
    assert not again.exists(D2)
    assert everything(tmp_path / "blobs") == {f"sha256/ab/{D1}/{name}" for name in FILES}


def test_concurrent_puts_and_deletes_leave_whole_blobs_or_none(store: BlobStore, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(40):
                if (turn + seed) % 4 == 0:
                    store.delete(D1)
                else:
                    store.put(D1, FILES)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    store.put(D1, FILES)
    store.close()  # what was deleted is gone from the disk too
    assert everything(tmp_path / "blobs") == {f"sha256/ab/{D1}/{name}" for name in FILES}
    assert (store.path(D1) / "adapter_model.safetensors").stat().st_size == 100_000


def test_delete_waits_for_no_slow_disk(store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry calls it under its lock, where new calls wait."""
    store.put(D1, FILES)
    may_remove, remove = threading.Event(), shutil.rmtree

    def slow(path: Path, **options: Any) -> None:
        assert may_remove.wait(20)
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", slow)
    store.delete(D1)
    assert not store.exists(D1)
    assert everything(tmp_path / "blobs") != set(), "it has waited"
    may_remove.set()
    store.close()
    assert everything(tmp_path / "blobs") == set()


def test_files_that_were_being_deleted_in_a_crash_are_swept(store: BlobStore, tmp_path: Path) -> None:
    """As it looks when the process dies between the rename and the removal."""
    store.put(D1, FILES)
    store.path(D1).rename(tmp_path / "blobs" / "tmp" / "doomed")
    assert BlobStore(tmp_path / "blobs").sweep({D1}) == ()
    assert everything(tmp_path / "blobs") == set()
