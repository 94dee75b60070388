"""Messages as bytes between the engine's process and the front end's: msgpack, each after its length. No pickle.

    parent ──Config, commands──────────────────> engine
    parent <──Ready | Refused, then Steps, Died── engine        end of file, either way: the other is gone, or is done

The first message each way is the start: how to load the base, and what came of it.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from chorus.engine.memory import MemoryPlan
from chorus.engine.messages import Command, Early, StepEvents
from chorus.models.facts import BaseFacts

_LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, frozen=True, tag=True):
    """The server's configuration, as JSON."""

    config: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The base is loaded; commands are taken from here on."""

    facts: BaseFacts
    memory: MemoryPlan


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The base can not be served: a ChorusError's parts."""

    code: str
    reason: str
    message: str


class Steps(msgspec.Struct, frozen=True, tag=True):
    """What the engine did since it last told, or what of that can not wait."""

    steps: Sequence[StepEvents | Early]


class Died(msgspec.Struct, frozen=True, tag=True):
    """The engine's last words; what happened is in its log."""

    error: str


ToEngine = Start | Command
FromEngine = Ready | Refused | Steps | Died

_encoder = msgspec.msgpack.Encoder()
to_engine: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)
from_engine: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    data = _encoder.encode(message)
    return _LENGTH.pack(len(data)) + data


class Frames:
    """Cuts what arrives into messages, whatever pieces it comes in."""

    def __init__(self, decoder: "msgspec.msgpack.Decoder[Any]") -> None:
        self._decoder = decoder
        self._unread = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are complete now."""
        self._unread += data
        while len(self._unread) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._unread)
            if len(self._unread) < _LENGTH.size + size:
                return
            message = bytes(self._unread[_LENGTH.size : _LENGTH.size + size])
            del self._unread[: _LENGTH.size + size]
            yield self._decoder.decode(message)
