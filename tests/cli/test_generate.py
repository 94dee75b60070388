import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from typer.testing import Result

from chorus.cli.options import SAMPLING
from chorus.v1 import adapter_pb2, generate_pb2, inference_pb2, model_pb2
from client.fake_chorus import FakeChorus, error_status

Run = Callable[..., Result]
VERSION = "tenants/acme/adapters/support/versions/" + "ab" * 32
FIRST = generate_pb2.GenerateResponse(token_ids=[5, 6], text="Hel", adapter_version=VERSION)
LAST = generate_pb2.GenerateResponse(
    token_ids=[7],
    text="lo",
    finish_reason=generate_pb2.FINISH_REASON_STOP,
    usage=generate_pb2.Usage(prompt_tokens=4, completion_tokens=3),
    timing=generate_pb2.Timing(first_token=Duration(nanos=500_000_000), total=Duration(seconds=1)),
    adapter_version=VERSION,
)
SILENT_END = generate_pb2.GenerateResponse(token_ids=[5, 6], finish_reason=generate_pb2.FINISH_REASON_LENGTH)


def test_json_is_one_object_with_all_of_the_completion(fake: FakeChorus, run_json: Callable[..., Any]) -> None:
    fake.answer("Inference.Generate", FIRST, LAST)
    assert run_json("generate", "--server", fake.address, "--prompt", "hi") == {
        "token_ids": [5, 6, 7],
        "text": "Hello",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 4, "cached_tokens": 0, "completion_tokens": 3},
        "timing": {"queue": 0.0, "adapter_load": 0.0, "first_token": 0.5, "total": 1.0},
        "version": VERSION,
    }


def test_text_is_null_without_a_tokenizer(fake: FakeChorus, run_json: Callable[..., Any]) -> None:
    fake.answer("Inference.Generate", SILENT_END)
    fake.answer("Inference.GetModel", model_pb2.Model(has_tokenizer=False))
    assert run_json("generate", "--server", fake.address, "--token-ids", "1,2")["text"] is None


def test_streamed_json_is_the_pieces_and_then_the_completion(fake: FakeChorus, run: Run) -> None:
    fake.answer("Inference.Generate", FIRST, LAST)
    result = run("generate", "--server", fake.address, "--prompt", "hi", "--json", "--stream")
    first, second, whole = (json.loads(line) for line in result.stdout.splitlines())
    assert first == {"delta": {"token_ids": [5, 6], "text": "Hel"}}
    assert second == {"delta": {"token_ids": [7], "text": "lo"}}
    assert whole["text"] == "Hello"


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_text_goes_to_stdout_and_the_summary_to_stderr(fake: FakeChorus, run: Run, stream: tuple[str, ...]) -> None:
    fake.answer("Inference.GetModel", model_pb2.Model(has_tokenizer=True))
    fake.answer("Inference.Generate", FIRST, LAST)
    result = run("generate", "--server", fake.address, "--prompt", "hi", *stream)
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert "stop: 4 + 3 tokens" in result.stderr


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_token_ids_are_shown_where_there_is_no_text(fake: FakeChorus, run: Run, stream: tuple[str, ...]) -> None:
    fake.answer("Inference.GetModel", model_pb2.Model(has_tokenizer=False))
    fake.answer("Inference.Generate", SILENT_END)
    assert run("generate", "--server", fake.address, "--token-ids", "1", *stream).stdout == "5,6\n"


def test_every_flag_arrives(fake: FakeChorus, run: Run) -> None:
    other = generate_pb2.GenerateResponse(index=1, text="x", finish_reason=generate_pb2.FINISH_REASON_STOP)
    fake.answer("Inference.Generate", other, LAST)
    flags = (
        *("--adapter", "acme/support@canary", "--token-ids", "1, 2,3", "--max-tokens", 9, "--min-tokens", 3),
        *("--temperature", 0, "--top-k", 4, "--top-p", 0.5, "--min-p", 0.25, "--seed", 11),
        *("--presence-penalty", 0.5, "--frequency-penalty", 0.25, "--repetition-penalty", 1.5, "--n", 2),
        *("--logit-bias", "7=-5", "--logit-bias", "8=2.5", "--logprobs", 0, "--prompt-logprobs", 3, "--json"),
        *("--priority", -2, "--request-id", "job-7"),
        *("--stop", "a,b", "--stop", "c", "--stop-token-ids", "7,8", "--ignore-eos", "--timeout", 33),
    )
    assert run("generate", "--server", fake.address, *flags).exit_code == 0
    call = fake.calls[0]
    assert call.request.adapter == "tenants/acme/adapters/support@canary"
    assert list(call.request.token_ids.ids) == [1, 2, 3]
    assert 23 < (call.time_left or 0) < 33.1
    assert call.request.sampling == generate_pb2.SamplingParams(
        max_tokens=9,
        min_tokens=3,
        temperature=0,
        top_k=4,
        top_p=0.5,
        min_p=0.25,
        seed=11,
        stop=["a,b", "c"],
        stop_token_ids=[7, 8],
        ignore_eos=True,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        n=2,
        logit_bias={7: -5.0, 8: 2.5},
        logprobs=0,
        prompt_logprobs=3,
    )
    assert (call.request.priority, call.request.request_id) == (-2, "job-7")


def test_the_flags_are_those_of_the_contract() -> None:
    assert {name for name, *_ in SAMPLING} == set(generate_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


def test_messages_are_sent(fake: FakeChorus, run: Run) -> None:
    fake.answer("Inference.Generate", LAST)
    assert run("generate", "--server", fake.address, "--messages", '[{"role": "user", "content": "hi"}]').exit_code == 0
    [message] = fake.calls[0].request.messages.messages
    assert (message.role, message.content) == ("user", "hi")


def test_several_outputs_are_told_apart(fake: FakeChorus, run: Run) -> None:
    other = generate_pb2.GenerateResponse(index=1, text="Bye", finish_reason=generate_pb2.FINISH_REASON_LENGTH)
    fake.answer("Inference.Generate", FIRST, other, LAST)
    result = run("generate", "--server", fake.address, "--prompt", "hi", "--n", 2)
    assert result.stdout == "--- 1 of 2: stop\nHello\n--- 2 of 2: length\nBye\n"


def test_a_typo_in_the_adapters_name_is_pointed_out(fake: FakeChorus, run: Run) -> None:
    fake.answer("Inference.Generate", error_status(grpc.StatusCode.NOT_FOUND, "no adapter", "ADAPTER_NOT_FOUND"))
    known = [adapter_pb2.Adapter(name=f"tenants/acme/adapters/{name}") for name in ("billing", "support")]
    fake.answer("Inference.ListAdapters", inference_pb2.ListAdaptersResponse(adapters=known))
    result = run("generate", "--server", fake.address, "--adapter", "acme/suport@canary", "--prompt", "hi")
    assert result.stderr == "chorus: NOT_FOUND (ADAPTER_NOT_FOUND): no adapter; did you mean acme/support?\n"
    assert fake.calls_of("Inference.ListAdapters")[0].request.parent == "tenants/acme"


def test_flags_not_given_are_left_to_the_server(fake: FakeChorus, run: Run) -> None:
    fake.answer("Inference.Generate", LAST)
    run("generate", "--server", fake.address, "--prompt", "hi")
    assert fake.calls[0].request == generate_pb2.GenerateRequest(text="hi")


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--prompt", "hi", "--token-ids", "1"),
        ("--token-ids", "1,x"),
        ("--prompt", "hi", "--stop-token-ids", "a"),
        ("--prompt", "hi", "--max-tokens", "many"),
        ("--prompt", "hi", "--logit-bias", "7"),
        ("--prompt", "hi", "--logprobs", "1"),
        ("--prompt", "hi", "--n", "2", "--stream"),
        ("--prompt", "hi", "--output", "out.jsonl"),
        ("--messages", "hi"),
        ("--messages", "[]"),
        ("--input", "in.jsonl"),
        ("--input", "in.jsonl", "--output", "out.jsonl", "--json"),
        ("--input", "in.jsonl", "--prompt", "hi"),
    ],
)
def test_wrong_flags_are_exit_2_and_nothing_is_asked(fake: FakeChorus, run: Run, flags: tuple[str, ...]) -> None:
    result = run("generate", "--server", fake.address, *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert not fake.calls


@pytest.mark.parametrize("flags", [("--json",), ("--stream",), ("--json", "--stream")])
def test_an_error_is_exit_1_and_one_line_with_code_and_reason(
    fake: FakeChorus, run: Run, flags: tuple[str, ...]
) -> None:
    fake.answer("Inference.GetModel", model_pb2.Model(has_tokenizer=True))
    gone = error_status(grpc.StatusCode.NOT_FOUND, "no adapter\nof that \x1b[31mname", "ADAPTER_NOT_FOUND")
    fake.answer("Inference.Generate", gone)
    result = run("generate", "--server", fake.address, "--adapter", "a/b", "--prompt", "hi", *flags)
    assert (result.exit_code, result.stdout.strip()) == (1, "")
    assert result.stderr == "chorus: NOT_FOUND (ADAPTER_NOT_FOUND): no adapter of that [31mname\n"


def test_when_to_try_again_is_said(fake: FakeChorus, run: Run) -> None:
    full = error_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_after_s=2)
    fake.answer("Inference.Generate", full)
    result = run("generate", "--server", fake.address, "--prompt", "hi")
    assert result.stderr == "chorus: RESOURCE_EXHAUSTED (QUEUE_FULL): full (try again in 2 s)\n"


def test_ctrl_c_is_exit_130_one_line_and_cancels(fake: FakeChorus) -> None:
    fake.answer("Inference.Generate", FIRST, fake.until_gone)
    script = Path(sys.executable).with_name("chorus")
    command = [str(script), "generate", "--server", fake.address, "--prompt", "hi", "--json", "--stream"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "chorus: interrupted\n")
    assert fake.gone.wait(5)
