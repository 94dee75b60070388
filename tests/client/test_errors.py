import socket

import grpc
import pytest

from chorus.client import Client
from chorus.client.transport import MAX_ATTEMPTS
from chorus.errors import (
    BY_CODE,
    ChorusError,
    DeadlineExceeded,
    FieldViolation,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from client.fake_chorus import FakeChorus, error_status


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_each_code_comes_back_as_its_class_with_the_servers_reason(fake: FakeChorus, client: Client, code: str) -> None:
    status = error_status(grpc.StatusCode[code], "what happened", "SOME_REASON")
    fake.answer("Inference.Generate", status, times=MAX_ATTEMPTS)
    with pytest.raises(ChorusError) as caught:
        client.generate("hi")
    assert type(caught.value) is BY_CODE[code]
    assert (caught.value.reason, caught.value.message) == ("SOME_REASON", "what happened")


@pytest.mark.parametrize("code", sorted(BY_CODE.keys() - {"UNAVAILABLE", "UNIMPLEMENTED", "DEADLINE_EXCEEDED"}))
def test_a_code_without_details_comes_back_as_its_class_too(fake: FakeChorus, client: Client, code: str) -> None:
    fake.answer("Inference.GetModel", (grpc.StatusCode[code], "from the transport"))
    with pytest.raises(ChorusError) as caught:
        client.model()
    assert type(caught.value) is BY_CODE[code]
    assert caught.value.reason == BY_CODE[code].default_reason
    assert caught.value.message == "from the transport"


@pytest.mark.parametrize("code", ["CANCELLED", "UNKNOWN", "OUT_OF_RANGE"])
def test_a_code_outside_the_table_is_a_plain_chorus_error(fake: FakeChorus, client: Client, code: str) -> None:
    fake.answer("Inference.GetModel", (grpc.StatusCode[code], "odd"))
    with pytest.raises(ChorusError) as caught:
        client.model()
    assert type(caught.value) is ChorusError
    assert caught.value.reason == code


def test_field_violations_come_back(fake: FakeChorus, client: Client) -> None:
    fields = {"sampling.temperature": "must be finite", "sampling.n": "at most 16"}
    fake.answer("Inference.Generate", error_status(grpc.StatusCode.INVALID_ARGUMENT, "no", "BAD_FIELD", fields=fields))
    with pytest.raises(InvalidArgument) as caught:
        client.generate("hi")
    assert caught.value.violations == (
        FieldViolation("sampling.temperature", "must be finite"),
        FieldViolation("sampling.n", "at most 16"),
    )


def test_when_to_try_again_comes_back(fake: FakeChorus, client: Client) -> None:
    full = error_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_after_s=1.5)
    fake.answer("Inference.Generate", full)
    with pytest.raises(ResourceExhausted) as caught:
        client.generate("hi")
    assert caught.value.retry_after_s == 1.5


def test_the_callers_request_id_comes_back(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", (grpc.StatusCode.NOT_FOUND, "gone"), times=2)
    with pytest.raises(NotFound) as caught:
        client.generate("hi", request_id="job-7")
    assert caught.value.request_id == "job-7"
    with pytest.raises(NotFound) as caught:
        client.generate("hi")
    assert caught.value.request_id is None


def test_garbled_details_leave_the_code_and_the_text(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.GetModel", (grpc.StatusCode.NOT_FOUND, "gone", b"\xff\xff\xff"))
    with pytest.raises(NotFound, match="gone"):
        client.model()


def test_a_draining_server_is_not_mistaken_for_an_absent_one(fake: FakeChorus, client: Client) -> None:
    draining = error_status(grpc.StatusCode.UNAVAILABLE, "draining", "DRAINING")
    fake.answer("Inference.GetModel", draining, times=MAX_ATTEMPTS)
    with pytest.raises(Unavailable) as caught:
        client.model()
    assert (caught.value.reason, caught.value.message) == ("DRAINING", "draining")


def test_a_refused_connection_names_the_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Client(address) as client, pytest.raises(Unavailable) as caught:
            client.generate("hi")
    assert caught.value.reason == "UNREACHABLE"
    assert address in caught.value.message
    assert "is the server running?" in caught.value.message


def test_a_passed_deadline_says_how_long_it_was(fake: FakeChorus) -> None:
    fake.answer("Inference.Generate", fake.until_gone)
    with Client(fake.address) as client, pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        client.generate("hi", timeout=0.2)


def test_the_wrong_port_is_suspected_when_the_method_is_not_there(fake: FakeChorus, client: Client) -> None:
    fake.answer("Adapters.GetResidency", (grpc.StatusCode.UNIMPLEMENTED, "Method not found!"))
    with pytest.raises(Unimplemented, match="right port"):
        client.residency()
