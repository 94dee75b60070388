import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from chorus.client import AsyncClient, BatchRequest, Progress, generate_file, read_lines, run_batch, run_file
from chorus.client.batch import MAX_ATTEMPTS
from chorus.errors import FailedPrecondition, InvalidArgument, Unavailable
from chorus.v1 import generate_pb2, model_pb2
from client.fake_chorus import FakeChorus, error_status

DONE = generate_pb2.GenerateResponse(token_ids=[5], text="x", finish_reason=generate_pb2.FINISH_REASON_STOP)
BAD = error_status(grpc.StatusCode.INVALID_ARGUMENT, "prompt: too long", "BAD_FIELD", fields={"prompt": "too long"})
FULL = error_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_after_s=0.01)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(fake: FakeChorus, tmp_path: Path) -> Callable[..., Any]:
    """Runs in.jsonl into out.jsonl, one request at a time unless told otherwise."""

    async def call(**options: Any) -> Progress:
        lines = read_lines(tmp_path / "in.jsonl", {})
        async with AsyncClient(fake.address, timeout=20) as client:
            return await run_file(client, lines, tmp_path / "out.jsonl", **({"concurrency": 1} | options))

    return call


async def test_each_line_is_answered_under_its_id(fake: FakeChorus, run: Any, tmp_path: Path) -> None:
    write(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": "hi", "adapter": "acme/support", "max_tokens": 3, "logit_bias": {"7": -5}},
        "",
        {"token_ids": [1, 2]},
        {"id": 9, "messages": [{"role": "user", "content": "hi"}], "priority": 2},
    )
    fake.answer("Inference.Generate", DONE, times=3)
    seen: list[Progress] = []
    assert await run(on_progress=seen.append) == Progress(total=3, done=3, resumed=0, failed=0)
    assert [progress.done for progress in seen] == [0, 1, 2, 3]
    lines = written(tmp_path / "out.jsonl")
    assert [(line["id"], line["line"]) for line in lines] == [("a", 1), ("line-3", 3), ("9", 4)]
    assert lines[0]["completion"]["text"] == "x"
    first, second, third = (call.request for call in fake.calls if call.method == "Inference.Generate")
    assert (first.text, first.sampling.max_tokens, dict(first.sampling.logit_bias)) == ("hi", 3, {7: -5.0})
    assert first.adapter == "tenants/acme/adapters/support"
    assert list(second.token_ids.ids) == [1, 2]
    assert (third.messages.messages[0].content, third.priority) == ("hi", 2)


async def test_a_line_that_fails_is_recorded_and_the_rest_go_on(fake: FakeChorus, run: Any, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    fake.answer("Inference.Generate", BAD)
    fake.answer("Inference.Generate", DONE)
    assert (await run()).failed == 1
    failed, answered = written(tmp_path / "out.jsonl")
    assert failed["error"] == {
        "code": "INVALID_ARGUMENT",
        "reason": "BAD_FIELD",
        "message": "prompt: too long",
        "fields": {"prompt": "too long"},
    }
    assert answered["completion"]["text"] == "x"


async def test_going_on_asks_for_what_is_missing_only(fake: FakeChorus, run: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    write(tmp_path / "in.jsonl", *({"id": name, "prompt": name} for name in "abc"))
    for answer in (DONE, BAD, DONE):
        fake.answer("Inference.Generate", answer)
    await run()
    # As a process leaves it that was killed while it wrote the last line.
    output.write_bytes(output.read_bytes()[:-20])
    fake.answer("Inference.Generate", DONE, times=2)
    assert await run() == Progress(total=3, done=3, resumed=1, failed=0)
    assert [call.request.text for call in fake.calls[3:]] == ["b", "c"]
    assert [(line["id"], "completion" in line) for line in written(output)] == [("a", True), ("b", True), ("c", True)]
    assert (await run()).resumed == 3


@pytest.mark.parametrize(
    "content",
    [
        "my diary",
        "my diary\n",
        '{"other": 1}\n',
        '{"id": "zzz", "line": 1, "request_sha256": "00", "completion": {}}\n',
        '{"id": "line-1", "line": 1, "request_sha256": "00", "completion": {}}\n',
    ],
)
async def test_a_file_that_is_no_output_of_this_input_is_left_alone(
    fake: FakeChorus, run: Any, tmp_path: Path, content: str
) -> None:
    write(tmp_path / "in.jsonl", {"prompt": "a"})
    output = tmp_path / "out.jsonl"
    output.write_text(content)
    with pytest.raises(FailedPrecondition, match=r"out\.jsonl:1"):
        await run()
    assert output.read_text() == content
    assert not fake.calls
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


async def test_a_busy_server_is_asked_again_when_it_says(fake: FakeChorus) -> None:
    fake.answer("Inference.Generate", FULL, times=2)
    fake.answer("Inference.Generate", DONE)
    pauses: list[float] = []

    def pause(seconds: float) -> float:
        pauses.append(seconds)
        return 0

    async with AsyncClient(fake.address, timeout=20) as client:
        [outcome] = [outcome async for outcome in run_batch(client, [BatchRequest("a", "hi")], pause=pause)]
    assert (outcome.attempts, outcome.error) == (3, None)
    assert pauses == [0.5, 1.0]


async def test_a_server_that_stays_full_is_the_lines_error(fake: FakeChorus) -> None:
    fake.answer("Inference.Generate", FULL, times=MAX_ATTEMPTS)
    async with AsyncClient(fake.address, timeout=20) as client:
        outcomes = [one async for one in run_batch(client, [BatchRequest("a", "hi")], pause=lambda seconds: 0)]
    assert [(one.attempts, one.error.reason if one.error else None) for one in outcomes] == [
        (MAX_ATTEMPTS, "QUEUE_FULL")
    ]


async def test_a_server_that_is_gone_ends_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chorus.client.batch.MAX_ATTEMPTS", 1)
    requests = [BatchRequest(str(number), "hi") for number in range(3)]
    async with AsyncClient("127.0.0.1:1", timeout=20) as client:
        with pytest.raises(Unavailable, match="is the server running"):
            _ = [one async for one in run_batch(client, requests, pause=lambda seconds: 0)]


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_no_more_run_at_once_than_asked(fake: FakeChorus, concurrency: int) -> None:
    running, most, lock = 0, 0, threading.Lock()
    all_there = threading.Barrier(concurrency)

    def count(context: grpc.ServicerContext) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        all_there.wait(10)
        time.sleep(0.05)  # one too many would be seen
        with lock:
            running -= 1

    fake.answer("Inference.Generate", count, DONE, times=9)
    requests = [BatchRequest(str(number), "hi") for number in range(9)]
    async with AsyncClient(fake.address, timeout=20) as client:
        outcomes = [one async for one in run_batch(client, requests, concurrency=concurrency)]
    assert {one.request.id for one in outcomes} == set("012345678")
    assert most == concurrency


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({}, "exactly one of prompt, token_ids, messages, not 0"),
        ({"prompt": "a", "token_ids": [1]}, "not 2"),
        ({"prompt": "a", "temprature": 1}, "unknown field 'temprature'; did you mean 'temperature'?"),
        ({"prompt": 5}, "prompt: must be a text"),
        ({"token_ids": "1,2"}, "token_ids: must be a list"),
        ({"messages": []}, "messages: must be"),
        ({"messages": [{"role": "user"}]}, "messages[0]: must hold role and content"),
        ({"prompt": "a", "max_tokens": "many"}, "sampling.max_tokens"),
        ({"prompt": "a", "adapter": 0}, "adapter: must be a text"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "id": ""}, "id: must have 1 to 128 characters"),
        ({"prompt": "a", "id": "same"}, "id: 'same' is the id of line 1 too"),
    ],
)
def test_a_wrong_line_is_named_with_file_line_and_field(tmp_path: Path, line: object, said: str) -> None:
    path = write(tmp_path / "in.jsonl", {"prompt": "fine", "id": "same"}, line)
    with pytest.raises(InvalidArgument) as caught:
        read_lines(path, {})
    assert str(caught.value).startswith(f"{path}:2: ")
    assert said in str(caught.value)


def test_defaults_are_for_lines_that_say_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b", "adapter": "x/y", "max_tokens": 2})
    first, second = read_lines(path, {"adapter": "acme/support", "max_tokens": 9})
    assert (first.request.adapter, first.request.sampling) == ("acme/support", {"max_tokens": 9})
    assert (second.request.adapter, second.request.sampling) == ("x/y", {"max_tokens": 2})


def test_a_program_without_an_event_loop_runs_a_file_in_one_call(fake: FakeChorus, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    fake.answer("Inference.GetModel", model_pb2.Model(has_tokenizer=True))
    fake.answer("Inference.Generate", DONE, times=2)
    lines = read_lines(source, {"max_tokens": 5})
    progress = generate_file(fake.address, lines, tmp_path / "out.jsonl", concurrency=1, timeout=20)
    assert progress == Progress(total=2, done=2, resumed=0, failed=0)
    assert [line["id"] for line in written(tmp_path / "out.jsonl")] == ["line-1", "line-2"]
    assert {call.request.sampling.max_tokens for call in fake.calls_of("Inference.Generate")} == {5}


def test_nobody_there_is_known_before_the_first_request(tmp_path: Path) -> None:
    lines = read_lines(write(tmp_path / "in.jsonl", {"prompt": "a"}))
    with pytest.raises(Unavailable) as caught:
        generate_file("127.0.0.1:1", lines, tmp_path / "out.jsonl", timeout=5)
    assert caught.value.reason == "UNREACHABLE"
    assert not (tmp_path / "out.jsonl").exists()
