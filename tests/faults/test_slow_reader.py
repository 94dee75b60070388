"""Fault 23: a reader that does not read.

Its request ends at once, and nothing of it is held. What it was ended by it hears when it reads on: in HTTP/2 a status
comes after the data before it, and nobody can overtake what flow control holds back. Its deadline it hears in time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from chorus.client import Client
from chorus.v1 import generate_pb2, inference_pb2_grpc
from faults.idleness import held, is_idle
from support.claims import assert_solo_greedy, refused, until
from support.server import ServerProcess
from support.worlds import PROMPT, TinyWorld

TOKENS, OUTPUTS = 240, 2


@contextmanager
def unread(server: ServerProcess, *, window: int = 64, timeout: float = 30, adapter: str = "") -> Iterator[Any]:
    """A call of some 200 kB whose reader takes `window` bytes, if not less than a message, and then no more."""
    sampling = generate_pb2.SamplingParams(max_tokens=TOKENS, n=OUTPUTS, logprobs=20, ignore_eos=True)
    prompt = generate_pb2.TokenIds(ids=PROMPT)
    request = generate_pb2.GenerateRequest(token_ids=prompt, sampling=sampling, adapter=adapter)
    options = [("grpc.enable_http_proxy", 0), ("grpc.http2.lookahead_bytes", window), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(server.inference, options) as channel:
        yield inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=timeout)


def slow_readers(server: ServerProcess) -> float:
    return server.scrape().value("chorus_errors_total", code="RESOURCE_EXHAUSTED", reason="SLOW_READER")


@pytest.fixture
def one_more(narrow: ServerProcess) -> Callable[[], bool]:
    """Whether the server has ended a call of a slow reader since."""
    until(lambda: is_idle(narrow), "nobody else is there")
    before = slow_readers(narrow)
    return lambda: slow_readers(narrow) == before + 1


@pytest.mark.parametrize("window", [64, 4096])
def test_reader_that_does_not_read_loses_its_own_stream_only(
    narrow: ServerProcess, world: TinyWorld, window: int, one_more: Callable[[], bool]
) -> None:
    with unread(narrow, window=window) as slow, narrow.client() as client:
        with client.stream(PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True) as neighbour:
            tokens = [token for delta in neighbour for token in delta.token_ids]
        until(lambda: is_idle(narrow), "its pages are back, though it still does not read")
        assert len(tokens) == TOKENS
        assert_solo_greedy(world.base, None, PROMPT, tokens)
        until(one_more, "its call is over for the server")
        # What it was ended by is there for it as soon as it reads on, and not before.
        assert slow.is_active()
        received = 0
        with refused("RESOURCE_EXHAUSTED") as error:
            for message in slow:
                received += len(message.token_ids)
        assert 0 < received < OUTPUTS * TOKENS
        assert error.reason == "SLOW_READER"
        assert error.retry_after_s


def test_reader_that_never_reads_hears_of_its_deadline_in_time_and_holds_nothing_until_then(
    narrow: ServerProcess, world: TinyWorld, one_more: Callable[[], bool]
) -> None:
    timeout = 4.0
    with narrow.client() as client:
        pushed = client.push(world.adapter("unread"), tenant="t23", name="unread")
        client.prefetch(pushed.version)
        began = time.monotonic()
        with unread(narrow, timeout=timeout, adapter="tenants/t23/adapters/unread") as slow:
            until(one_more, "the server has ended it")
            assert held(client) == 0
            delete_with_files(client, narrow, pushed.digest)
            assert slow.is_active(), "over before its deadline: nothing was tested"
            assert slow.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert timeout - 0.5 < time.monotonic() - began < timeout + 10


def delete_with_files(client: Client, server: ServerProcess, digest: str) -> None:
    """Files go with the last call that holds them."""
    [folder] = server.state_dir.glob(f"blobs/**/{digest}")
    client.delete("t23/unread")
    until(lambda: not folder.exists(), "no call holds the version any more")
