"""The strict reader against the safetensors library (for files that are sound) and against files that lie."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chorus.adapters.safetensors_file import HEADER_LIMIT, read, read_tensors
from chorus.errors import ChorusError, FailedPrecondition, InvalidArgument


def packed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: Any = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(content)
    return path


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(2, 2, 2).to(torch.float16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})

    read = read_tensors(path)

    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_unaligned_tensor_is_read_whole(tmp_path: Path) -> None:
    half, single = torch.tensor([1.5], dtype=torch.float16), torch.tensor([3.25, -1.0])
    data = half.numpy().tobytes() + single.numpy().tobytes()
    path = write(tmp_path, packed({"h": entry(0, 2, [1], "F16"), "s": entry(2, 10)}, data))
    assert torch.equal(read_tensors(path)["s"], single)


LIES = {
    "empty file": (b"", "0 bytes"),
    "only a length": ((639).to_bytes(8, "little"), "8 bytes"),
    "header past the end": (packed({"a": entry(0, 4)})[:20], "truncated"),
    "header over the limit": ((HEADER_LIMIT + 1).to_bytes(8, "little") + b"{}", "limit"),
    "length of 2**64 - 1": (b"\xff" * 8 + b"{}", "limit"),
    "header is no JSON": (packed(b"{nonsense}"), "not valid JSON"),
    "header is no object": (packed(b"[]"), "start with {"),
    "header is not UTF-8": (packed(b'{"\xff": 1}'), "UTF-8"),
    "NaN in the header": (packed(b'{"a": NaN}'), "NaN"),
    "deep nesting": (packed(b'{"a":' * 100_000), "nested"),
    "duplicate key": (packed(b'{"a": {}, "a": {}}'), "given twice"),
    "duplicate field": (packed(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "given twice"),
    "entry is no object": (packed({"a": 3}), "exactly"),
    "missing field": (packed({"a": {"dtype": "F32", "shape": [1]}}), "exactly"),
    "extra field": (packed({"a": {**entry(0, 4), "x": 1}}, bytes(4)), "exactly"),
    "unknown dtype": (packed({"a": entry(0, 4, dtype="F31")}, bytes(4)), "F31"),
    "dtype is no string": (packed({"a": {**entry(0, 4), "dtype": ["F32"]}}, bytes(4)), "dtype"),
    "negative shape": (packed({"a": entry(0, 4, [-1])}, bytes(4)), "shape"),
    "fractional shape": (packed({"a": entry(0, 4, [1.0])}, bytes(4)), "shape"),
    "shape of booleans": (packed({"a": entry(0, 4, [True])}, bytes(4)), "shape"),
    "astronomical shape": (packed({"a": entry(0, 4, [2**62, 2**62])}, bytes(4)), "needs"),
    "too many dimensions": (packed({"a": entry(0, 4, [1] * 9)}, bytes(4)), "shape"),
    "negative offset": (packed({"a": entry(-4, 0, [1])}, bytes(4)), "data_offsets"),
    "three offsets": (packed({"a": {**entry(0, 4), "data_offsets": [0, 2, 4]}}, bytes(4)), "data_offsets"),
    "offsets reversed": (packed({"a": entry(4, 0, [1])}, bytes(4)), "data_offsets"),
    "size unlike shape": (packed({"a": entry(0, 8, [1])}, bytes(8)), "needs 4"),
    "data past the end": (packed({"a": entry(0, 8)}, bytes(4)), "truncated"),
    "overlap": (packed({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps"),
    "two names for the same bytes": (packed({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "overlaps"),
    "hole": (packed({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "belong to none"),
    "does not start at 0": (packed({"a": entry(4, 8)}, bytes(8)), "belong to none"),
    "trailing bytes": (packed({"a": entry(0, 4)}, bytes(5)), "belong to none"),
    "metadata of numbers": (packed({"__metadata__": {"a": 1}}), "__metadata__"),
}


@pytest.mark.parametrize(("content", "says"), LIES.values(), ids=LIES.keys())
def test_malformed_file_is_refused_saying_what_is_wrong(content: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_tensors(write(tmp_path, content))
    assert says in caught.value.message
    assert caught.value.reason in ("MALFORMED_FILE", "MALFORMED_JSON")
    assert str(tmp_path) not in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3"])
def test_well_formed_dtype_that_is_not_served_is_a_precondition(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=dtype):
        read_tensors(write(tmp_path, packed({"a": entry(0, 4, [1], dtype)}, bytes(4))))


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the canary sang",))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_is_refused_unopened(protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps(Canary(), protocol=protocol) + bytes(2000)
    with pytest.raises(InvalidArgument) as caught:
        read_tensors(write(tmp_path, content))
    assert caught.value.reason == "PICKLE_REFUSED"


def test_torch_archive_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Canary()))
    with pytest.raises(InvalidArgument) as caught:
        read_tensors(path)
    assert caught.value.reason == "PICKLE_REFUSED"


def test_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    header = json.dumps({"a": entry(0, 4)}).encode().ljust(640)
    content = packed(header, bytes(4))
    assert content.startswith(b"\x80\x02")
    assert torch.equal(read_tensors(write(tmp_path, content))["a"], torch.zeros(1))


def test_symlink_and_folder_are_refused(tmp_path: Path) -> None:
    target = write(tmp_path, packed({}))
    link = tmp_path / "link.safetensors"
    link.symlink_to(target)
    for path in (link, tmp_path):
        with pytest.raises(InvalidArgument, match="regular file"):
            read_tensors(path)
    with pytest.raises(InvalidArgument, match="missing"):
        read_tensors(tmp_path / "nothing")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, bad: float, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for place in range(0, 150, 7):
        tensors = {"a": torch.randn(50).to(dtype), "b": torch.randn(10, 10).to(dtype)}
        save_file(tensors, path)
        assert read(path).not_finite() is None
        tensors["a" if place < 50 else "b"].view(-1)[place % 50] = bad
        save_file(tensors, path)
        assert read(path).not_finite() == ("a" if place < 50 else "b")


@pytest.mark.parametrize("bad", ["a", "b", "c", "d"])
def test_the_tensor_that_is_not_finite_is_named_among_dtypes_and_odd_places(bad: str, tmp_path: Path) -> None:
    header = {"a": entry(0, 2, [1], "F16"), "b": entry(2, 6), "c": entry(6, 14, [2]), "d": entry(14, 16, [1], "BF16")}
    places = {"a": 0, "b": 2, "c": 10, "d": 14}
    infinite = {"a": b"\x00\x7c", "b": b"\x00\x00\x80\x7f", "c": b"\x00\x00\x80\xff", "d": b"\x80\x7f"}
    data = bytearray(16)
    assert read(write(tmp_path, packed(header, bytes(data)))).not_finite() is None
    data[places[bad] : places[bad] + len(infinite[bad])] = infinite[bad]
    assert read(write(tmp_path, packed(header, bytes(data)))).not_finite() == bad


def test_files_of_one_header_are_each_checked_and_read(tmp_path: Path) -> None:
    header = {"a": entry(0, 4)}
    for number in (1.0, 2.0):
        data = torch.tensor([number]).numpy().tobytes()
        assert read_tensors(write(tmp_path, packed(header, data)))["a"].tolist() == [number]
    for data in (bytes(3), bytes(5)):
        with pytest.raises(InvalidArgument):
            read_tensors(write(tmp_path, packed(header, data)))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_whatever_bytes_change_the_reader_is_at_least_as_strict_as_the_library(
    data: st.DataObject, tmp_path: Path
) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0).to(torch.bfloat16)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) - 3, len(content)))])

    try:
        mine = read_tensors(path)
    except ChorusError:
        return
    try:
        with safe_open(path, "pt") as file:
            theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        pytest.fail(f"the library refuses what we read: {error}")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in mine)
