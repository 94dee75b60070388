import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import Result

from chorus.v1 import generate_pb2, model_pb2
from client.fake_chorus import FakeChorus, error_status

Run = Callable[..., Result]
DONE = generate_pb2.GenerateResponse(token_ids=[5], text="x", finish_reason=generate_pb2.FINISH_REASON_STOP)
BAD = error_status(grpc.StatusCode.INVALID_ARGUMENT, "too long", "BAD_FIELD")


@pytest.fixture
def batch(fake: FakeChorus, run: Run, tmp_path: Path) -> Run:
    """Runs two lines, the second with an adapter of its own."""
    lines = [{"prompt": "a"}, {"prompt": "b", "adapter": "globex/help"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fake.answer("Inference.GetModel", model_pb2.Model(has_tokenizer=True), times=9)
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    return lambda *flags: run("generate", "--server", fake.address, *files, "--concurrency", 1, *flags)


def ids(output: Path) -> list[Any]:
    return [json.loads(line)["id"] for line in output.read_text().splitlines()]


def test_a_file_is_answered_and_flags_are_its_defaults(fake: FakeChorus, batch: Run, tmp_path: Path) -> None:
    fake.answer("Inference.Generate", DONE, times=2)
    result = batch("--adapter", "acme/support", "--max-tokens", 7, "--timeout", 33)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "2 of 2 answered" in result.stderr
    first, second = fake.calls_of("Inference.Generate")
    assert [call.request.adapter for call in (first, second)] == [
        "tenants/acme/adapters/support",
        "tenants/globex/adapters/help",
    ]
    assert first.request.sampling.max_tokens == 7
    assert 23 < (first.time_left or 0) < 33.1
    assert ids(tmp_path / "out.jsonl") == ["line-1", "line-2"]


def test_on_a_terminal_a_bar_shows_how_far_it_is(fake: FakeChorus, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    fake.answer("Inference.GetModel", model_pb2.Model(has_tokenizer=True))
    fake.answer("Inference.Generate", BAD)
    drawn = threading.Event()
    fake.answer("Inference.Generate", lambda context: drawn.wait(20), DONE)
    script = Path(sys.executable).with_name("chorus")
    files = ("--input", "in.jsonl", "--output", "out.jsonl", "--concurrency", "1")
    terminal, stderr = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        command = [str(script), "generate", "--server", fake.address, *files]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        with subprocess.Popen(command, stderr=stderr, cwd=tmp_path, env=environment) as asking:
            os.close(stderr)
            shown = b""
            with suppress(OSError):  # how Linux ends a terminal that nobody holds any more
                while piece := screen.read(4096):
                    shown += piece
                    if b"1/2" in shown:
                        drawn.set()
    assert asking.returncode == 1
    assert b"in.jsonl, 1 failed" in shown
    assert b"1/2" in shown
    assert b"1 of 2 answered" in shown


def test_a_failed_line_is_exit_1_and_running_again_asks_for_it_only(
    fake: FakeChorus, batch: Run, tmp_path: Path
) -> None:
    for answer in (BAD, DONE, DONE):
        fake.answer("Inference.Generate", answer)
    first = batch()
    assert first.exit_code == 1
    assert "1 of 2 answered" in first.stderr
    assert "1 failed" in first.stderr
    second = batch()
    assert second.exit_code == 0
    assert "2 of 2 answered, 1 of them from an earlier run" in second.stderr
    assert [call.request.text for call in fake.calls_of("Inference.Generate")] == ["a", "b", "a"]


def test_a_wrong_line_is_exit_2_and_nothing_is_asked(fake: FakeChorus, batch: Run, tmp_path: Path) -> None:
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write('{"promt": "c"}\n')
    result = batch()
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "in.jsonl:3: unknown field 'promt'; did you mean 'prompt'?" in result.stderr
    assert not fake.calls
    assert not (tmp_path / "out.jsonl").exists()


def test_a_missing_input_is_exit_1_and_one_line(run: Run) -> None:
    result = run("generate", "--input", "absent.jsonl", "--output", "out.jsonl")
    assert (result.exit_code, result.stderr) == (1, "chorus: No such file or directory: absent.jsonl\n")


def test_nobody_there_is_exit_1_at_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    result = run("generate", "--server", "127.0.0.1:1", *files)
    assert result.exit_code == 1
    assert "UNREACHABLE" in result.stderr
    assert "chorus serve" in result.stderr
