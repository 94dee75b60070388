"""Requests that no client of ours would send: wild wire data shaped like a method's message, and mutated valid ones.

    messages(descriptor)   hypothesis: any field, any value, wrong wire types, unknown fields, bad UTF-8
    mutated(random, data)  a valid serialised message with bits, bytes and lengths changed, cut, doubled or extended

Everything is made of bytes: a generated class would refuse to hold most of it.
"""

import struct
from collections.abc import Callable
from random import Random

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import strategies as st

VARINT, FIXED64, LENGTH, GROUP, END_GROUP, FIXED32 = range(6)
DEPTH = 3
MAX_FIELDS = 7

_NUMBERS = (0, 1, 2, 3, 16, 127, 128, 1279, 1280, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
_DOUBLES = (0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), -1.0)
_NAMES = (
    *("", "-", "user", "system", "tool", "live", "tenants/fuzz", "tenants/fuzz/adapters/victim", "tenants/-"),
    *("tenants/fuzz/adapters/victim@live", "tenants/fuzz/adapters/victim/versions/" + "0" * 64, "0" * 64),
    *("adapter_config.json", "adapter_model.safetensors", "task.json", "../task.json", "\0"),
    *("a" * 10_000, "{{ 9**9**9 }}", "%s%n%s", "\ufdd0 \u202e \U0001f600", "Message: This is Tom from Berlin.\nCity:"),
)
_BAD_UTF8 = (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"a\x80", b"\xe2\x82")
_DOUBLE_TYPES = {FieldDescriptor.TYPE_DOUBLE}
_FIXED64_TYPES = {FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_SFIXED64}
_FIXED32_TYPES = {FieldDescriptor.TYPE_FIXED32, FieldDescriptor.TYPE_SFIXED32, FieldDescriptor.TYPE_FLOAT}


def varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*data, value))


def tagged(number: int, wire: int, payload: bytes) -> bytes:
    """One field as it stands on the wire; a length goes before the payload where the wire type has one."""
    length = varint(len(payload)) if wire == LENGTH else b""
    return varint(number << 3 | wire) + length + payload


def messages(descriptor: Descriptor, depth: int = DEPTH, *, most: int = MAX_FIELDS) -> st.SearchStrategy[bytes]:
    """Serialised messages of this type with at most so many fields: mostly well formed, always wild."""
    fields = [_field(field, depth) for field in descriptor.fields if depth or field.message_type is None]
    return st.lists(st.one_of(*fields, *fields, _foreign()), max_size=most).map(b"".join)


def _field(field: FieldDescriptor, depth: int) -> st.SearchStrategy[bytes]:
    if field.message_type is not None:
        return messages(field.message_type, depth - 1).map(lambda data: tagged(field.number, LENGTH, data))
    if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        text = st.sampled_from(_NAMES) | st.text(max_size=40)
        encoded = text.map(lambda value: value.encode("utf-8", "surrogatepass"))
        data = st.one_of(encoded, encoded, encoded, st.sampled_from(_BAD_UTF8), st.binary(max_size=20))
        return data.map(lambda value: tagged(field.number, LENGTH, value))
    wire, values = _scalar(field)
    single = values.map(lambda value: tagged(field.number, wire, value))
    packed = st.lists(values, max_size=40).map(lambda many: tagged(field.number, LENGTH, b"".join(many)))
    return single | packed


def _scalar(field: FieldDescriptor) -> tuple[int, st.SearchStrategy[bytes]]:
    if field.type in _DOUBLE_TYPES:
        return FIXED64, (st.sampled_from(_DOUBLES) | st.floats()).map(lambda value: struct.pack("<d", value))
    if field.type in _FIXED64_TYPES:
        return FIXED64, st.binary(min_size=8, max_size=8)
    if field.type in _FIXED32_TYPES:
        return FIXED32, st.binary(min_size=4, max_size=4)
    return VARINT, (st.sampled_from(_NUMBERS) | st.integers(0, 2**64 - 1)).map(varint)


def _foreign() -> st.SearchStrategy[bytes]:
    """Fields that the message does not know, wire types that its fields do not have, nesting, plain garbage."""
    number = st.sampled_from((1, 2, 3, 4, 9, 15, 16, 31, 2047, 2**29 - 1))
    shaped = st.tuples(number, st.integers(0, 5), st.binary(max_size=12)).map(lambda parts: tagged(*parts))
    nested = st.integers(1, 200).map(nest)
    return shaped | nested | st.binary(max_size=16)


def nest(depth: int) -> bytes:
    """Groups within groups: parsers that recurse have a limit, or a crash."""
    return tagged(1000, GROUP, b"") * depth + tagged(1000, END_GROUP, b"") * depth


def mutated(random: Random, data: bytes) -> bytes:
    """`data` after one to four changes."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        random.choice(_MUTATIONS)(random, changed)
    return bytes(changed)


def _flip(random: Random, data: bytearray) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _replace(random: Random, data: bytearray) -> None:
    if data:
        data[random.randrange(len(data))] = random.randrange(256)


def _cut(random: Random, data: bytearray) -> None:
    del data[random.randint(0, len(data)) :]


def _drop(random: Random, data: bytearray) -> None:
    start = random.randint(0, len(data))
    del data[start : start + random.randint(1, 8)]


def _double(random: Random, data: bytearray) -> None:
    start = random.randint(0, len(data))
    data[start:start] = data[start : start + random.randint(1, 32)]


def _insert(random: Random, data: bytearray) -> None:
    piece = random.choice((random.randbytes(random.randint(1, 8)), varint(random.choice(_NUMBERS)), *_BAD_UTF8))
    start = random.randint(0, len(data))
    data[start:start] = piece


def _extend(random: Random, data: bytearray) -> None:
    data += random.choice((random.randbytes(random.randint(1, 16)), nest(random.choice((1, 99, 101, 5000)))))


_MUTATIONS: tuple[Callable[[Random, bytearray], None], ...] = (
    *(_flip, _replace, _cut, _drop, _double, _insert, _extend),
)
