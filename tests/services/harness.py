"""A running server and what a test wants of it: stubs, uploads, errors as a client sees them."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from chorus.admin.v1 import adapters_pb2, adapters_pb2_grpc
from chorus.config import ServerConfig
from chorus.services.assembly import ChorusServer, Endpoints
from chorus.v1 import generate_pb2, inference_pb2_grpc
from services.fakes import FakeEngine, lora_files, upload


@dataclass(slots=True)
class Rig:
    """A running server, its fake engine, and stubs to talk to it."""

    server: ChorusServer
    engine: FakeEngine
    endpoints: Endpoints
    channel: grpc.aio.Channel
    admin_channel: grpc.aio.Channel
    inference: "inference_pb2_grpc.InferenceAsyncStub"
    admin: "adapters_pb2_grpc.AdaptersAsyncStub"
    health: Any
    config: ServerConfig

    async def publish(
        self, parent: str = "tenants/a/adapters/x", **options: Any
    ) -> adapters_pb2.CreateAdapterVersionResponse:
        """Uploads a LoRA; options as `fakes.upload` and `fakes.lora_files` take them."""
        files = lora_files(**{key: options.pop(key) for key in ("rank", "seed", "task") if key in options})
        return await self.admin.CreateAdapterVersion(upload(parent, files, **options))

    async def generate(self, **fields: Any) -> list[generate_pb2.GenerateResponse]:
        heard: list[generate_pb2.GenerateResponse] = []
        await self.hear(heard, **fields)
        return heard

    async def hear(self, heard: list[generate_pb2.GenerateResponse], **fields: Any) -> None:
        """Generates; each message is in `heard` once it is here."""
        fields = fields if {"token_ids", "messages"} & fields.keys() else {"text": "hello"} | fields
        async for message in self.inference.Generate(generate_pb2.GenerateRequest(**fields), timeout=20):
            heard.append(message)  # noqa: PERF401 - others read it meanwhile


MakeRig = Callable[..., Awaitable[Rig]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client sees of an error."""

    code: str
    message: str
    reason: str
    domain: str
    fields: dict[str, str]
    retry_after_s: float | None


async def refused(call: Awaitable[Any]) -> Refusal:
    """Awaits a call that has to fail; its google.rpc.Status, read with grpc_status as any client would."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return read_refusal(error.value)


def read_refusal(error: grpc.aio.AioRpcError) -> Refusal:
    status = rpc_status.from_call(error)
    assert status is not None, f"{error.code()} came without google.rpc.Status"
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    has_retry = False
    for detail in status.details:
        has_retry |= detail.Is(retry.DESCRIPTOR)
        for target in (info, bad, retry):
            if detail.Is(target.DESCRIPTOR):
                detail.Unpack(target)
    return Refusal(
        error.code().name,
        status.message,
        info.reason,
        info.domain,
        {violation.field: violation.description for violation in bad.field_violations},
        retry.retry_delay.ToNanoseconds() / 1e9 if has_retry else None,
    )


async def until(holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Waits for something that happens on another thread or task. Looks once more when the time is up."""
    ended = time.monotonic() + timeout_s
    while True:
        is_last_look = time.monotonic() >= ended
        if holds():
            return
        assert not is_last_look, f"not within {timeout_s:g} s"
        await asyncio.sleep(0.005)
