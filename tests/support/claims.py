"""What tests of a running server claim, in words: tokens are the oracle's, calls are refused, things become so."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from support.tiny import solo_logits

CLEAR_GAP = 1e-4


def assert_solo_greedy(base: Path, adapter: Path | None, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """`tokens` are what transformers + peft alone generate greedily: each is the likeliest after all before it."""
    assert tokens, "no tokens at all"
    logits = solo_logits(base, adapter, [*prompt, *tokens])[len(prompt) - 1 : -1]
    best = logits.topk(2)
    for at, (token, expected) in enumerate(zip(tokens, best.indices[:, 0].tolist(), strict=True)):
        gap = float(best.values[at, 0] - best.values[at, 1])
        assert gap > CLEAR_GAP, f"token {at}: the oracle itself is not sure ({gap})"
        assert token == expected, f"token {at} is {token}, alone it is {expected} (gap {gap:.3g})"


def until(holds: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    """Returns once `holds()`; for what the server does not announce. Looks once more when the time is up."""
    ended = time.monotonic() + timeout
    while True:
        is_last_look = time.monotonic() >= ended
        if holds():
            return
        assert not is_last_look, f"not within {timeout:g} s: {what}"
        time.sleep(0.01)


@dataclass
class Refusal:
    """An error as it came over the wire."""

    code: str = ""
    message: str = ""
    reason: str = ""
    fields: tuple[str, ...] = ()
    retry_after_s: float | None = None


@contextmanager
def refused(code: str) -> Iterator[Refusal]:
    """The block's raw gRPC call fails with `code` and the details of the table; they are filled in at the end."""
    refusal = Refusal()
    with pytest.raises(grpc.RpcError) as caught:
        yield refusal
    _fill(refusal, caught.value)
    assert refusal.code == code, refusal


def _fill(refusal: Refusal, error: grpc.RpcError) -> None:
    refusal.code = error.code().name
    refusal.message = error.details() or ""
    status = rpc_status.from_call(error)
    assert status is not None, f"a bare code without details: {refusal}"
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "chorus"
            refusal.reason = info.reason
        if detail.Unpack(bad):
            refusal.fields = tuple(violation.field for violation in bad.field_violations)
        if detail.Unpack(retry):
            refusal.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    assert refusal.reason, f"no ErrorInfo: {refusal}"
