"""Whoever has only gRPC can use the server: nothing of ours has to be installed on the caller's side."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chorus.v1 import inference_pb2
from support.server import ServerProcess

PROMPT = "Message: This is Tom from Berlin.\nCity:"


@pytest.fixture(scope="module")
def found(embedded: ServerProcess) -> dict[str, Any]:
    """What a stranger made of the server."""
    program = Path(__file__).with_name("stranger.py")
    command = [sys.executable, "-I", str(program), embedded.inference, PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ours"] == []
    return found


def test_reflection_tells_the_whole_service(found: dict[str, Any]) -> None:
    assert {"chorus.v1.Inference", "grpc.health.v1.Health"} <= set(found["services"])
    assert "chorus.admin.v1.Adapters" not in found["services"]
    assert found["methods"] == [m.name for m in inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods]


def test_stranger_streams_what_our_client_gets(found: dict[str, Any], embedded: ServerProcess) -> None:
    assert found["messages"] > 1
    assert found["tokens"] == found["completion_tokens"] == 24
    assert found["finish_reason"] == "FINISH_REASON_LENGTH"
    with embedded.client() as client:
        ours = client.generate(PROMPT, max_tokens=24, temperature=0, ignore_eos=True)
    assert found["text"] == ours.text != ""


def test_unknown_adapter_is_not_found_with_reason_and_domain(found: dict[str, Any]) -> None:
    assert found["error"] == {
        "code": "NOT_FOUND",
        "message": "no such adapter, alias or version",
        "reason": "ADAPTER_NOT_FOUND",
        "domain": "chorus",
    }
