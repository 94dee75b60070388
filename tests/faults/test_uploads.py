"""Faults 9, 10, 12 and 13: uploads that run code, lie, are not finite, or do not fit; none leaves a trace."""

import json
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chorus.admin.v1 import adapters_pb2, adapters_pb2_grpc
from chorus.client import Client
from support.claims import Refusal, refused, until
from support.server import ServerProcess, run_command
from support.tiny import save_adapter, save_base
from support.worlds import CONFIG, TENSORS, TinyWorld, edit_config, listing, tensors_of, write_tensors

PARENT = "tenants/mallory/adapters/gift"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    """One that sings: proven on a copy of itself."""
    canary = Canary(tmp_path / "sang")
    pickle.loads(pickle.dumps(canary))
    canary.path.unlink()
    return canary


@pytest.fixture
def nothing_stored(calm: ServerProcess, client: Client) -> Iterator[None]:
    """The test leaves neither a file nor a record behind."""
    before = listing(calm.state_dir)
    yield
    assert client.list_adapters("mallory") == ()
    assert listing(calm.state_dir) == before


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "README.md"}


def refused_upload(server: ServerProcess, files: dict[str, bytes], code: str) -> Refusal:
    """Sends files as they are, past all that our client would refuse."""
    header = adapters_pb2.UploadHeader(
        parent=PARENT, files=[adapters_pb2.UploadFile(name=name, size_bytes=len(data)) for name, data in files.items()]
    )
    parts = [adapters_pb2.CreateAdapterVersionRequest(header=header)]
    parts += [
        adapters_pb2.CreateAdapterVersionRequest(chunk=adapters_pb2.UploadChunk(data=data)) for data in files.values()
    ]
    with server.channel(admin=True) as channel, refused(code) as error:
        adapters_pb2_grpc.AdaptersStub(channel).CreateAdapterVersion(iter(parts), timeout=20)
    assert str(server.state_dir) not in error.message
    return error


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "../adapter_model.pkl", TENSORS, CONFIG])
def test_pickle_is_refused_under_any_name_and_stays_silent(
    calm: ServerProcess, world: TinyWorld, canary: Canary, name: str
) -> None:
    good = files_of(world.adapter("r8"))
    torch.save(canary, canary.path.with_suffix(".zip"))
    for data in (pickle.dumps(canary), canary.path.with_suffix(".zip").read_bytes()):
        error = refused_upload(
            calm, {**good, name: data} if name in good else {CONFIG: good[CONFIG], name: data}, "INVALID_ARGUMENT"
        )
        assert error.reason == ("MALFORMED_JSON" if name == CONFIG else "PICKLE_REFUSED"), error
    assert not canary.path.exists()


@pytest.mark.usefixtures("nothing_stored")
def test_push_of_a_folder_with_a_pickle_is_refused_and_says_why(
    calm: ServerProcess, world: TinyWorld, canary: Canary
) -> None:
    folder = world.copy(world.adapter("r8"), "pickled")
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(canary))
    push = ("adapters", "push", str(folder), "--tenant", "mallory", "--name", "gift", "--admin", calm.admin)
    done = run_command(*push)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "PICKLE_REFUSED" in line
    assert "adapter_model.bin" in line
    assert not canary.path.exists()


def test_push_sends_the_safetensors_and_never_the_pickle_beside_them(
    calm: ServerProcess, client: Client, world: TinyWorld, canary: Canary
) -> None:
    folder = world.copy(world.adapter("r8"), "both")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(canary))
    pushed = client.push(folder, tenant="both", name="kinds")
    assert not canary.path.exists()
    blob = calm.state_dir / "blobs" / "sha256" / pushed.digest[:2] / pushed.digest
    assert {path.name for path in blob.iterdir()} == {CONFIG, TENSORS}
    client.delete("both/kinds")
    # Removed after the answer, on a thread; the next test counts every file.
    until(lambda: not blob.exists() and not listing(calm.state_dir / "blobs" / "tmp"), "its files are gone")


def header_and_data(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def assembled(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def lying(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """A file whose header says what `change` makes of it, over the same data."""

    def spoil(data: bytes) -> bytes:
        header, body = header_and_data(data)
        change(header)
        return assembled(header, body)

    return spoil


def overlap(data: bytes) -> bytes:
    """Two tensors share their bytes, and nothing else is wrong: every byte belongs to somebody."""
    header, body = header_and_data(data)
    ranges = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    first, second = sorted(ranges, key=lambda name: ranges[name][0])[:2]
    begin, end = ranges[second]
    for name, (start, stop) in ranges.items():
        if start >= end:
            header[name]["data_offsets"] = [start - (end - begin), stop - (end - begin)]
    header[second] = header[first]
    return assembled(header, body[:begin] + body[end:])


def doubled_key(data: bytes) -> bytes:
    """One tensor twice in the header: readers differ in which they believe."""
    header, body = header_and_data(data)
    text = json.dumps(header)[:-1] + f', "{FIRST}": {json.dumps(header[FIRST])}}}'
    return struct.pack("<Q", len(text)) + text.encode() + body


CORRUPT: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half a length": lambda data: data[:5],
    "length only": lambda data: data[:8],
    "ends in the header": lambda data: data[:200],
    "ends before the data": lambda data: data[: 8 + struct.unpack("<Q", data[:8])[0]],
    "ends a byte early": lambda data: data[:-1],
    "a byte too many": lambda data: data + b"\0",
    "header length 2^63": lambda data: struct.pack("<Q", 1 << 63) + data[8:],
    "header length over the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "header length one short": lambda data: struct.pack("<Q", struct.unpack("<Q", data[:8])[0] - 1) + data[8:],
    "header no JSON": lambda data: data[:8] + b"{" + b"\xff" * 7 + data[16:],
    "offset over the end": lying(lambda header: header[FIRST].update(data_offsets=[0, 1 << 40])),
    "offset negative": lying(lambda header: header[FIRST].update(data_offsets=[-2048, 0])),
    "shape over the bytes": lying(lambda header: header[FIRST].update(shape=[1 << 20, 1 << 20])),
    "shape overflows 64 bits": lying(lambda header: header[FIRST].update(shape=[1 << 62, 8])),
    "dtype half as wide": lying(lambda header: header[FIRST].update(dtype="F16")),
    "dtype unknown": lying(lambda header: header[FIRST].update(dtype="O")),
    "overlap": overlap,
    "hole": lying(lambda header: header.pop(FIRST)),
    "tensor twice": doubled_key,
}


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize("spoil", CORRUPT.values(), ids=CORRUPT)
def test_corrupt_safetensors_is_invalid_and_nothing_is_stored(
    calm: ServerProcess, world: TinyWorld, spoil: Callable[[bytes], bytes]
) -> None:
    files = files_of(world.adapter("r8"))
    error = refused_upload(calm, {**files, TENSORS: spoil(files[TENSORS])}, "INVALID_ARGUMENT")
    assert error.reason == "MALFORMED_FILE", error
    assert TENSORS in error.message


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize("missing", [1, 5000])
def test_upload_that_stops_early_is_invalid_and_nothing_is_stored(
    calm: ServerProcess, world: TinyWorld, missing: int
) -> None:
    files = files_of(world.adapter("r8"))
    header = adapters_pb2.UploadHeader(
        parent=PARENT, files=[adapters_pb2.UploadFile(name=name, size_bytes=len(data)) for name, data in files.items()]
    )
    body = b"".join(files.values())[:-missing]
    parts = [
        adapters_pb2.CreateAdapterVersionRequest(header=header),
        adapters_pb2.CreateAdapterVersionRequest(chunk=adapters_pb2.UploadChunk(data=body)),
    ]
    with calm.channel(admin=True) as channel, refused("INVALID_ARGUMENT") as error:
        adapters_pb2_grpc.AdaptersStub(channel).CreateAdapterVersion(iter(parts), timeout=20)
    assert error.reason == "UPLOAD_INCOMPLETE"


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_invalid_and_named(calm: ServerProcess, world: TinyWorld, value: float) -> None:
    folder = world.copy(world.adapter("r8"), "not-finite")
    tensors = tensors_of(folder)
    name = sorted(tensors)[5]
    tensors[name].view(-1)[-1] = value
    write_tensors(folder, tensors)
    error = refused_upload(calm, files_of(folder), "INVALID_ARGUMENT")
    assert error.reason == "NOT_FINITE"
    assert name in error.message


def another_digest(world: TinyWorld, folder: Path) -> str:
    (folder / "task.json").write_text(json.dumps({"format_version": 1, "base_digest": "d" * 64}))
    return "d" * 64


def another_family(world: TinyWorld, folder: Path) -> str:
    base = save_base(world.folder / "gpt2", "gpt2")
    save_adapter(base, folder, 3, r=8, fan_in_fan_out=True)
    return "transformer.h.0"


def another_width(world: TinyWorld, folder: Path) -> str:
    tensors = tensors_of(folder)
    tensors[FIRST] = torch.randn(8, 128)
    write_tensors(folder, tensors)
    return FIRST.removeprefix("base_model.model.")


def unknown_target(world: TinyWorld, folder: Path) -> str:
    edit_config(folder, target_modules=["query_key_value"])
    return "down_proj"


def rank_over_limit(world: TinyWorld, folder: Path) -> str:
    for path in world.adapter("r32", r=32).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return "rank 32 is over this server's limit of 16"


MISFITS = {
    "base digest": (another_digest, "BASE_MISMATCH"),
    "base family": (another_family, "UNKNOWN_MODULE"),
    "shape": (another_width, "SHAPE_MISMATCH"),
    "target": (unknown_target, "UNTARGETED_TENSOR"),
    "rank": (rank_over_limit, "RANK_OVER_LIMIT"),
}


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize(("spoil", "reason"), MISFITS.values(), ids=MISFITS)
def test_adapter_that_does_not_fit_is_a_failed_precondition_that_names_what(
    calm: ServerProcess, world: TinyWorld, spoil: Callable[[TinyWorld, Path], str], reason: str
) -> None:
    folder = world.copy(world.adapter("r8"), "misfit")
    named = spoil(world, folder)
    error = refused_upload(calm, files_of(folder), "FAILED_PRECONDITION")
    assert error.reason == reason, error
    assert named in error.message
