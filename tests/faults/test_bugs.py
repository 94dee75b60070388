"""Fault 26: a bug in a handler, and a cancellation that nobody asked for."""

import re
import time
from collections.abc import Iterator
from statistics import median

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chorus.v1 import generate_pb2, inference_pb2, inference_pb2_grpc
from support.claims import refused
from support.server import ServerProcess, together
from support.worlds import PROMPT, TinyWorld

REQUEST = generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=PROMPT))
CALLS = 5


@pytest.fixture(scope="module")
def buggy(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServerProcess]]:
    """Servers whose Generate raises: `error` a RuntimeError, `cancel` a CancelledError."""
    options = ("--model", str(world.base), "--dtype", "float32", "--kv-cache-mb", "1")
    servers = {
        action: ServerProcess(
            tmp_path_factory.mktemp(action) / "state", *options, failpoints=f"inference.generate={action}"
        )
        for action in ("error", "cancel")
    }
    with together(*servers.values()):
        yield servers


@pytest.mark.parametrize("action", ["error", "cancel"])
def test_bug_in_generate_is_internal_within_a_second_and_the_server_lives(
    buggy: dict[str, ServerProcess], action: str
) -> None:
    server = buggy[action]
    with server.channel() as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        seconds = []
        for _ in range(CALLS):
            began = time.monotonic()
            with refused("INTERNAL") as error:
                list(stub.Generate(REQUEST, timeout=10))
            seconds.append(time.monotonic() - began)
            # An id that the log has too, and nothing else.
            incident = re.fullmatch(r"internal error; the server's log has it under ([0-9a-f]{16})", error.message)
            assert incident is not None, error.message
            server.wait_for_log(incident[1])
        assert median(seconds) < 1, seconds  # the machine may have stood still for one of them
        assert stub.GetModel(inference_pb2.GetModelRequest(), timeout=5).context_length == 256
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert server.scrape().value("chorus_errors_total", code="INTERNAL", reason="INTERNAL") == CALLS
    assert server.alive
