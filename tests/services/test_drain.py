"""Start and end: order of the drain, the engine's death, ports that are taken, signals."""

import asyncio
import os
import signal
import socket
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2

from chorus.admin.v1 import adapters_pb2
from chorus.errors import ChorusError, FailedPrecondition, InvalidArgument
from chorus.services.assembly import EXIT_ENGINE_DIED
from chorus.services.server import _on_signals
from services.fakes import lora_files, never_ends, says, silent, upload
from services.harness import MakeRig, Rig, refused, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("service", ["", "chorus.v1.Inference", "chorus.admin.v1.Adapters"])
async def test_health_is_serving_once_the_server_is_up(rig: Rig, service: str) -> None:
    answer = await rig.health.Check(health_pb2.HealthCheckRequest(service=service))
    assert answer.status == SERVING


async def test_health_flips_before_the_first_call_is_refused(rig: Rig) -> None:
    watch = rig.health.Watch(health_pb2.HealthCheckRequest(service="chorus.v1.Inference"))
    statuses = aiter(watch)
    assert (await anext(statuses)).status == SERVING
    refusals: list[bool] = []

    async def call_until_refused() -> None:
        while True:
            try:
                await rig.generate()
            except grpc.aio.AioRpcError:
                refusals.append(True)
                return

    calling = asyncio.ensure_future(call_until_refused())
    rig.server.drain_soon()
    assert (await anext(statuses)).status == NOT_SERVING
    await calling
    assert refusals
    watch.cancel()


async def test_streams_under_way_finish_and_late_calls_are_refused(rig: Rig) -> None:
    rig.engine.reply = says("a long answer", pause_s=0.03)
    running = asyncio.ensure_future(rig.generate())
    await until(lambda: bool(rig.engine.commands))
    draining = asyncio.ensure_future(rig.server.until_drained())
    await rig.admin.Drain(adapters_pb2.DrainRequest())
    late = await refused(rig.generate())
    assert (late.code, late.reason) == ("UNAVAILABLE", "DRAINING")
    assert late.retry_after_s is not None
    assert "".join(m.text for m in await running) == "a long answer"
    assert await draining == 0


async def test_streams_that_outlive_the_grace_are_told_so(rig: Rig) -> None:
    rig.engine.reply = never_ends
    running = asyncio.ensure_future(rig.generate())
    await until(lambda: bool(rig.engine.commands))
    draining = asyncio.ensure_future(rig.server.until_drained())
    grace = Duration()
    grace.FromMilliseconds(100)
    await rig.admin.Drain(adapters_pb2.DrainRequest(grace=grace))
    seen = await refused(running)
    assert (seen.code, seen.reason) == ("UNAVAILABLE", "DRAINING")
    assert await draining == 0
    assert rig.engine.aborted


async def test_drain_ends_uploads_and_calls_that_wait_for_an_adapter(make_rig: MakeRig) -> None:
    rig = await make_rig(drain_grace_s=0.1)
    version = (await rig.publish()).version
    rig.engine.reply, rig.engine.loads_answered = silent, False
    loading = asyncio.ensure_future(
        as_coroutine(rig.admin.PrefetchVersion(adapters_pb2.PrefetchVersionRequest(name=version.name)))
    )
    waiting = asyncio.ensure_future(rig.generate(adapter="tenants/a/adapters/x"))
    uploading = rig.admin.CreateAdapterVersion()
    await uploading.write(next(upload("tenants/a/adapters/y", lora_files())))
    await until(lambda: len(rig.engine.commands) == 3)  # the upload's check is the first
    rig.server.drain_soon()
    assert await asyncio.wait_for(rig.server.until_drained(), 5) == 0
    for call in (loading, waiting, as_coroutine(uploading)):
        seen = await refused(call)
        assert (seen.code, seen.reason) == ("UNAVAILABLE", "DRAINING")
    assert not list((rig.config.state_dir / "blobs" / "tmp").iterdir())


async def test_death_of_the_engine_ends_everything_with_unavailable(rig: Rig) -> None:
    rig.engine.reply = never_ends
    running = asyncio.ensure_future(rig.generate())
    await until(lambda: bool(rig.engine.commands))
    watch = rig.health.Watch(health_pb2.HealthCheckRequest())
    statuses = aiter(watch)
    assert (await anext(statuses)).status == SERVING
    await asyncio.to_thread(rig.engine.die, RuntimeError("device lost"))
    seen = await refused(running)
    assert (seen.code, seen.reason) == ("UNAVAILABLE", "ENGINE_DEAD")
    assert "device lost" not in seen.message
    assert (await anext(statuses)).status == NOT_SERVING
    assert (await refused(rig.generate())).code == "UNAVAILABLE"
    assert await asyncio.wait_for(rig.server.until_drained(), 5) == EXIT_ENGINE_DIED
    watch.cancel()


@pytest.mark.parametrize("flag", ["port", "admin_port", "metrics_port"])
async def test_taken_port_is_a_clear_failure_and_leaves_nothing_running(
    make_rig: MakeRig, tmp_path: Path, flag: str
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(FailedPrecondition) as error:
            await make_rig(**{flag: port})
    assert f"127.0.0.1:{port} is taken" in error.value.message
    assert f"--{flag.replace('_', '-')}" in error.value.message
    assert await (await make_rig()).generate()


async def test_second_server_does_not_share_a_port(rig: Rig, make_rig: MakeRig, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="--port"):
        await make_rig(port=rig.endpoints.port, state_dir=tmp_path / "other")


async def test_second_server_does_not_share_a_registry(rig: Rig, make_rig: MakeRig) -> None:
    with pytest.raises(ChorusError, match="registry"):
        await make_rig()


async def test_address_that_is_not_ours_is_a_clear_failure(make_rig: MakeRig) -> None:
    with pytest.raises(InvalidArgument, match="--host"):
        await make_rig(host="192.0.2.1")


async def test_sigterm_drains_and_the_server_ends_well(rig: Rig) -> None:
    rig.engine.reply = says("to the end", pause_s=0.02)
    running = asyncio.ensure_future(rig.generate())
    await until(lambda: bool(rig.engine.commands))
    loop = asyncio.get_running_loop()
    _on_signals(rig.server)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(rig.server.until_drained(), 5) == 0
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signum)
    assert "".join(m.text for m in await running) == "to the end"


async def test_close_is_quick_although_somebody_watches_health(make_rig: MakeRig) -> None:
    rig = await make_rig(drain_grace_s=60.0)
    watch = rig.health.Watch(health_pb2.HealthCheckRequest())
    await anext(aiter(watch))
    began = time.monotonic()
    await rig.server.close()
    assert time.monotonic() - began < 10  # one second here


async def as_coroutine(call: object) -> object:
    return await call  # type: ignore[misc]
