import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from chorus.v1 import adapter_pb2, generate_pb2, inference_pb2, model_pb2
from client.fake_chorus import FakeChorus, error_status

STOP = generate_pb2.FINISH_REASON_STOP
NO_TEMPLATE = error_status(grpc.StatusCode.FAILED_PRECONDITION, "no chat template", "NO_CHAT_TEMPLATE")
Talk = Callable[..., "subprocess.CompletedProcess[str]"]


def says(text: str) -> generate_pb2.GenerateResponse:
    return generate_pb2.GenerateResponse(token_ids=[1], text=text, finish_reason=STOP)


def asked(fake: FakeChorus) -> list[list[tuple[str, str]]]:
    """The dialogues that were sent."""
    return [
        [(message.role, message.content) for message in call.request.messages.messages]
        for call in fake.calls_of("Inference.Generate")
    ]


@pytest.fixture
def command(fake: FakeChorus) -> list[str]:
    fake.answer("Inference.GetModel", model_pb2.Model(name="tiny", has_tokenizer=True), times=9)
    return [str(Path(sys.executable).with_name("chorus")), "chat", "--server", fake.address]


@pytest.fixture
def talk(command: list[str]) -> Talk:
    """Sends lines through a pipe."""
    return lambda *lines, flags=(): subprocess.run(
        [*command, *flags], input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=60, check=False
    )


def test_each_question_brings_what_was_said(fake: FakeChorus, talk: Talk) -> None:
    fake.answer("Inference.Generate", says("Hello"))
    fake.answer("Inference.Generate", says("Fine"))
    done = talk("hi", "how are you?", flags=("--system", "be brief"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello\nFine\n", "")
    assert asked(fake)[1] == [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "Hello"),
        ("user", "how are you?"),
    ]


def test_an_adapter_takes_over_and_the_dialogue_stays(fake: FakeChorus, talk: Talk) -> None:
    fake.answer("Inference.Generate", says("one"))
    known = adapter_pb2.Adapter(name="tenants/globex/adapters/help", aliases={"canary": "ab" * 32})
    fake.answer("Inference.GetAdapter", known)
    fake.answer("Inference.Generate", says("two"))
    done = talk("hi", "/adapter globex/help@canary", "again")
    assert done.stdout == "one\ntwo\n"
    assert [call.request.adapter for call in fake.calls_of("Inference.Generate")] == [
        "",
        "tenants/globex/adapters/help@canary",
    ]
    assert fake.calls_of("Inference.GetAdapter")[0].request.name == "tenants/globex/adapters/help"
    assert asked(fake)[1][0] == ("user", "hi")


def test_a_wrong_adapter_changes_nothing_and_the_nearest_is_named(fake: FakeChorus, talk: Talk) -> None:
    gone = error_status(grpc.StatusCode.NOT_FOUND, "no such adapter", "ADAPTER_NOT_FOUND")
    fake.answer("Inference.GetAdapter", gone)
    known = [adapter_pb2.Adapter(name="tenants/acme/adapters/support")]
    fake.answer("Inference.ListAdapters", inference_pb2.ListAdaptersResponse(adapters=known))
    fake.answer("Inference.Generate", says("one"))
    done = talk("/adapter acme/suport", "hi")
    assert (done.returncode, done.stdout) == (1, "one\n")
    assert done.stderr.endswith("no such adapter; did you mean acme/support?\n")
    assert fake.calls_of("Inference.Generate")[0].request.adapter == ""


def test_a_wrong_alias_changes_nothing_and_those_there_are_named(fake: FakeChorus, talk: Talk) -> None:
    known = adapter_pb2.Adapter(name="tenants/acme/adapters/support", aliases={"live": "ab" * 32})
    fake.answer("Inference.GetAdapter", known)
    fake.answer("Inference.ListAdapters", inference_pb2.ListAdaptersResponse(adapters=[known]))
    fake.answer("Inference.Generate", says("one"))
    done = talk("/adapter acme/support@cnary", "hi")
    assert (done.returncode, done.stdout) == (1, "one\n")
    assert done.stderr.endswith("no alias cnary; acme/support has @live\n")
    assert fake.calls_of("Inference.Generate")[0].request.adapter == ""


def test_without_a_template_plain_text_goes_and_it_is_said_once(fake: FakeChorus, talk: Talk) -> None:
    fake.answer("Inference.Generate", NO_TEMPLATE)
    fake.answer("Inference.Generate", says("one"))
    fake.answer("Inference.Generate", says("two"))
    done = talk("hi", "again")
    assert (done.returncode, done.stdout) == (0, "one\ntwo\n")
    assert done.stderr.count("plain text") == 1
    assert [call.request.text for call in fake.calls_of("Inference.Generate")] == ["", "hi\n", "hi\none\nagain\n"]


def test_reset_system_help_and_quit(fake: FakeChorus, talk: Talk) -> None:
    fake.answer("Inference.Generate", says("one"), times=3)
    done = talk("hi", "/reset", "/system be kind", "hi", "/help", "/quit", "never asked")
    assert asked(fake) == [[("user", "hi")], [("system", "be kind"), ("user", "hi")]]
    assert "/adapter NAME" in done.stderr


def test_a_question_that_fails_is_forgotten_and_the_session_goes_on(fake: FakeChorus, talk: Talk) -> None:
    fake.answer("Inference.Generate", error_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL"))
    fake.answer("Inference.Generate", says("one"))
    done = talk("first", "/nonsense", "second")
    assert (done.returncode, done.stdout) == (1, "one\n")
    first, second = done.stderr.splitlines()
    assert first == "chorus: RESOURCE_EXHAUSTED (QUEUE_FULL): full"
    assert "/nonsense" in second
    assert asked(fake)[1] == [("user", "second")]


def test_nobody_there_is_one_line_that_says_what_to_do() -> None:
    script = str(Path(sys.executable).with_name("chorus"))
    done = subprocess.run(
        [script, "chat", "--server", "127.0.0.1:1"],
        input="hi\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert "chorus serve" in line


class Terminal:
    """A `chorus chat` that believes that it has a terminal."""

    def __init__(self, command: list[str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, text: str) -> None:
        while text not in self._seen:
            self._seen += os.read(self._master, 4096).decode()
        self._seen = self._seen.partition(text)[2]

    def ctrl_c(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(command: list[str]) -> Iterator[Terminal]:
    terminal = Terminal(command)
    terminal.read_until("base>")
    yield terminal
    terminal.close()


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_the_session(fake: FakeChorus, terminal: Terminal) -> None:
    fake.answer("Inference.Generate", generate_pb2.GenerateResponse(token_ids=[1], text="endless"), fake.until_gone)
    fake.answer("Inference.Generate", says("second"))
    terminal.type("hi\n")
    terminal.read_until("endless")
    terminal.ctrl_c()
    terminal.read_until("(stopped)")
    terminal.read_until("base>")
    terminal.type("go on\n")
    terminal.read_until("second")
    terminal.read_until("base>")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
    assert asked(fake)[1] == [("user", "hi"), ("assistant", "endless"), ("user", "go on")]


def test_ctrl_c_at_any_moment_never_ends_the_session(fake: FakeChorus, terminal: Terminal) -> None:
    """From before the question is read to after the answer has begun."""
    endless = generate_pb2.GenerateResponse(token_ids=[1], text="endless")
    fake.answer("Inference.Generate", endless, fake.until_gone, times=100)
    for i in range(40):
        terminal.type("hi\n")
        terminal.read_until("hi")
        time.sleep(i * 0.0005)
        terminal.ctrl_c()
        terminal.read_until(")")
        terminal.read_until("base>")
    time.sleep(0.3)
    terminal.ctrl_c()  # the last question may have been read after its Ctrl-C
    terminal.read_until(")")
    terminal.read_until("base>")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
    assert len(asked(fake)) > 5
