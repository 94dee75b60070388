"""Strict reading of one safetensors file; nothing is ever unpickled.

Format (huggingface/safetensors): 8 bytes little-endian header length N, N bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`, then the data, to the last byte.

Stricter than the library where a stranger's file could mean two things (duplicate keys, holes, overlaps), and it reads
the bytes it has checked: the file is opened once and never mapped, so that a change underneath can neither slip past
the checks nor end the process with SIGBUS.
"""

import math
import os
import stat
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import torch

from chorus.adapters.strict_json import parse_object, quote
from chorus.errors import FailedPrecondition, InvalidArgument

HEADER_LIMIT = 16 << 20
"""Bytes. The library allows 100 MB; the header of an adapter of 100,000 tensors has 15 MB."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_OTHER_DTYPES = frozenset(
    ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F64", "C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
)
_PICKLES = (b"PK\x03\x04", b"PK\x05\x06", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the header; `begin` and `end` count bytes from the start of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def refuse_pickle(what: str) -> NoReturn:
    """Raises the error that every pickle gets, whatever it is called."""
    raise InvalidArgument(
        f"{what} is a pickle or an archive; Chorus never opens those. Save the adapter as safetensors.",
        reason="PICKLE_REFUSED",
        field=what,
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Checks the file and reads its tensors, in the order of the data.

    The tensors share one buffer of the data's size.

    Raises:
        InvalidArgument: a symlink or no regular file; truncated, lying or overlapping; PICKLE_REFUSED for a pickle.
        FailedPrecondition: a tensor of a dtype other than F32, F16, BF16.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        entries, data_start = _read_header(file, size, path.name)
        data = bytearray(size - data_start)
        if file.readinto(data) != len(data):
            _malformed(path.name, "it became shorter while it was read")
    return {entry.name: _tensor(data, entry) for entry in entries}


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading, never through a symlink.

    Raises:
        InvalidArgument: there is no such file, or it is a symlink, a folder or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InvalidArgument(f"{path.name} is missing", reason="MISSING_FILE", field=path.name) from None
    except OSError as error:
        if path.is_symlink():
            raise _not_regular(path) from None
        raise error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return os.fdopen(descriptor, "rb")


def _not_regular(path: Path) -> InvalidArgument:
    return InvalidArgument(f"{quote(path.name)} is not a regular file", reason="NOT_A_REGULAR_FILE", field=path.name)


def _malformed(what: str, problem: str) -> NoReturn:
    raise InvalidArgument(f"{what} is not a valid safetensors file: {problem}", reason="MALFORMED_FILE", field=what)


def _read_header(file: BufferedReader, size: int, what: str) -> tuple[list[TensorEntry], int]:
    """The checked entries in the order of their data, and where the data starts."""
    start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    # A header of 640 bytes starts with 80 02, as a pickle does: only what can not be safetensors is called a pickle.
    if length > HEADER_LIMIT or start[8:] != b"{":
        if start.startswith(_PICKLES):
            refuse_pickle(what)
        if len(start) < 9:
            _malformed(what, f"only {size} bytes")
    if length > HEADER_LIMIT:
        _malformed(what, f"the header claims {length} bytes, the limit is {HEADER_LIMIT}")
    if 8 + length > size:
        _malformed(what, f"truncated: the header claims {length} bytes, {size - 8} follow")
    if start[8:] != b"{":
        _malformed(what, "the header does not start with {")
    file.seek(8)
    header = parse_object(file.read(length), what, reason="MALFORMED_FILE")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _malformed(what, "__metadata__ is not a map of strings")
    entries = [_entry(name, fields, what) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_layout(entries, size - 8 - length, what)
    return entries, 8 + length


def _entry(name: str, fields: Any, what: str) -> TensorEntry:
    tensor = f"tensor {quote(name, 200)}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        _malformed(what, f"{tensor} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS:
        _malformed(what, f"{tensor} has no valid shape: {quote(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _malformed(what, f"{tensor} has no valid data_offsets: {quote(offsets)}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if isinstance(dtype, str) and dtype in _OTHER_DTYPES:
            raise FailedPrecondition(
                f"{tensor} is {dtype}; adapters are served in {', '.join(DTYPES)}", reason="UNSUPPORTED_DTYPE"
            )
        _malformed(what, f"{tensor} has the unknown dtype {quote(dtype)}")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    begin, end = offsets
    if end - begin != needed:
        _malformed(what, f"{tensor} spans {end - begin} bytes, but {dtype} {quote(shape)} needs {needed}")
    return TensorEntry(name, DTYPES[dtype], tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    """Whether a parsed JSON value is a list of numbers >= 0 that fit an offset (True is no number)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(entries: list[TensorEntry], data_size: int, what: str) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    position = 0
    for entry in entries:
        if entry.end > data_size:
            _malformed(
                what,
                f"truncated: tensor {quote(entry.name, 200)} ends at byte {entry.end} of the data, "
                f"which has {data_size}",
            )
        if entry.begin < position:
            _malformed(what, f"tensor {quote(entry.name, 200)} overlaps the one before it")
        if entry.begin > position:
            _malformed(what, f"{entry.begin - position} bytes before tensor {quote(entry.name, 200)} belong to none")
        position = entry.end
    if position != data_size:
        _malformed(what, f"{data_size - position} bytes after the last tensor belong to none")


def _tensor(data: bytearray, entry: TensorEntry) -> torch.Tensor:
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if entry.begin % entry.dtype.itemsize:
        data, begin = data[entry.begin : entry.end], 0
    else:
        begin = entry.begin
    flat = torch.frombuffer(data, dtype=entry.dtype, count=math.prod(entry.shape), offset=begin)
    return flat.view(entry.shape)
