import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from chorus.admin.v1 import adapters_pb2
from chorus.client import Client
from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.v1 import adapter_pb2
from client.fake_chorus import FakeChorus, error_status

DIGEST = "ab" * 32
NAME = "tenants/acme/adapters/support"
STORED = adapters_pb2.CreateAdapterVersionResponse(
    version=adapter_pb2.AdapterVersion(
        name=f"{NAME}/versions/{DIGEST}", digest=DIGEST, kind="LORA", max_rank=8, size_bytes=2_560_000
    ),
    adapter=adapter_pb2.Adapter(name=NAME, aliases={"live": DIGEST}, etag="e1"),
    created=True,
)
METHOD = "Adapters.CreateAdapterVersion"


def test_a_push_tells_what_was_stored(fake: FakeChorus, client: Client, folder: Path) -> None:
    fake.answer(METHOD, STORED)
    pushed = client.push(folder, tenant="acme", name="support")
    assert (pushed.name, pushed.digest, pushed.version) == (NAME, DIGEST, f"{NAME}/versions/{DIGEST}")
    assert (pushed.kind, pushed.max_rank, pushed.size_bytes) == ("LORA", 8, 2_560_000)
    assert (pushed.created, pushed.aliases, pushed.etag) == (True, {"live": DIGEST}, "e1")


def test_only_the_adapters_own_files_are_sent_byte_for_byte(fake: FakeChorus, client: Client, folder: Path) -> None:
    (folder / "task.json").write_text("{}")
    fake.answer(METHOD, STORED)
    client.push(folder, tenant="acme", name="support")
    header, *chunks = fake.calls[0].requests
    assert header.header.parent == NAME
    files = {file.name: file.size_bytes for file in header.header.files}
    assert list(files) == ["adapter_config.json", "adapter_model.safetensors", "task.json"]
    sent = b"".join(part.chunk.data for part in chunks)
    assert sent == b"".join((folder / name).read_bytes() for name in files)
    assert sum(files.values()) == len(sent)


def test_chunks_are_at_most_a_mebibyte(fake: FakeChorus, client: Client, folder: Path) -> None:
    fake.answer(METHOD, STORED)
    client.push(folder, tenant="acme", name="support")
    sizes = [len(part.chunk.data) for part in fake.calls[0].requests[1:]]
    assert max(sizes) == 1 << 20
    assert 0 not in sizes


@pytest.mark.parametrize(("alias", "sent"), [("live", "live"), ("canary", "canary"), (None, "")])
def test_the_alias_is_always_explicit(
    fake: FakeChorus, client: Client, folder: Path, alias: str | None, sent: str
) -> None:
    fake.answer(METHOD, STORED)
    client.push(folder, tenant="acme", name="support", alias=alias)
    header = fake.calls[0].requests[0].header
    assert header.HasField("alias")
    assert header.alias == sent


def test_each_push_has_its_own_request_id(fake: FakeChorus, client: Client, folder: Path) -> None:
    for _ in range(2):
        fake.answer(METHOD, STORED)
        client.push(folder, tenant="acme", name="support")
    first, second = (call.requests[0].header.request_id for call in fake.calls)
    assert first
    assert first != second


def test_progress_rises_to_the_whole_size(fake: FakeChorus, client: Client, folder: Path) -> None:
    fake.answer(METHOD, STORED)
    seen: list[tuple[int, int]] = []
    client.push(folder, tenant="acme", name="support", on_progress=lambda done, total: seen.append((done, total)))
    whole = sum((folder / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert seen == sorted(seen)
    assert seen[-1] == (whole, whole)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_and_nothing_is_sent(fake: FakeChorus, client: Client, folder: Path, name: str) -> None:
    (folder / "adapter_model.safetensors").rename(folder / name)
    with pytest.raises(InvalidArgument, match=name) as caught:
        client.push(folder, tenant="acme", name="support")
    assert caught.value.reason == "PICKLE_REFUSED"
    assert not fake.calls


def test_a_pickle_beside_safetensors_is_left_where_it_is(fake: FakeChorus, client: Client, folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    fake.answer(METHOD, STORED)
    client.push(folder, tenant="acme", name="support")
    assert "adapter_model.bin" not in [file.name for file in fake.calls[0].requests[0].header.files]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "task.json"])
def test_a_symlinked_file_is_refused_and_nothing_is_sent(
    fake: FakeChorus, client: Client, folder: Path, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(InvalidArgument, match="symbolic link"):
        client.push(folder, tenant="acme", name="support")
    assert not fake.calls


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(client: Client, folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InvalidArgument, match=name):
        client.push(folder, tenant="acme", name="support")


def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(client: Client, folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    with pytest.raises(InvalidArgument, match="not a regular file"):
        client.push(folder, tenant="acme", name="support")


def test_a_folder_that_is_not_there_is_an_os_error(client: Client, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        client.push(tmp_path / "nowhere", tenant="acme", name="support")


def test_a_refusal_during_the_upload_comes_back(fake: FakeChorus, client: Client, folder: Path) -> None:
    refused = error_status(grpc.StatusCode.FAILED_PRECONDITION, "rank 512 is over 128", "RANK_OVER_LIMIT")
    fake.answer(METHOD, next, refused)
    with pytest.raises(FailedPrecondition) as caught:
        client.push(folder, tenant="acme", name="support")
    assert caught.value.reason == "RANK_OVER_LIMIT"


def test_a_file_that_shrinks_meanwhile_ends_the_push(fake: FakeChorus, client: Client, folder: Path) -> None:
    def shrink(requests: Iterator[adapters_pb2.CreateAdapterVersionRequest]) -> None:
        for _ in requests:
            os.truncate(folder / "adapter_model.safetensors", 0)

    (folder / "adapter_model.safetensors").write_bytes(bytes(64 << 20))
    fake.answer(METHOD, shrink)
    with pytest.raises(InvalidArgument) as caught:
        client.push(folder, tenant="acme", name="support")
    assert caught.value.reason == "FILE_CHANGED"
