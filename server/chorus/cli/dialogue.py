"""The dialogue behind `chorus chat`: what was said, who answers, and the commands that begin with a slash."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from chorus.cli.lazy import describe
from chorus.cli.output import complain
from chorus.cli.suggest import adapter_suggestions
from chorus.errors import ChorusError, FailedPrecondition, NotFound

if TYPE_CHECKING:
    from chorus.client import Client, Message, Sampling, Stream

HELP = """/adapter NAME  let another adapter answer from here on; the base model without NAME
/system TEXT   set the system message; none without TEXT
/reset         forget what was said; the system message stays
/help          this
/quit          leave, as Ctrl-D does; Ctrl-C stops an answer"""
NO_TEMPLATE = "NO_CHAT_TEMPLATE"


class Dialogue:
    """Holds the history and sends it with each question: as messages, or as plain lines where there is no template."""

    def __init__(self, client: "Client", sampling: "Sampling", system: str) -> None:
        self.adapter = ""
        self._client = client
        self._sampling = sampling
        self._system = system
        self._history: list[Message] = []
        # Found out by the first question to each adapter.
        self._plain = False
        self._busy = self._stopped = False
        self._answer: Stream | None = None

    def take(self, line: str) -> bool:
        """Does what a line asks for; False if it could not, which stderr then says in one line."""
        self._busy, self._stopped = True, False
        try:
            if line.startswith("/"):
                return self._command(line)
            return self._ask(line)
        except ChorusError as error:
            complain(describe(error))
            return False
        finally:
            self._busy = False

    @contextmanager
    def stopped_by_ctrl_c(self) -> Iterator[None]:
        """Inside, Ctrl-C ends the answer under way and nothing else; where none is, it is a KeyboardInterrupt.

        An exception in the middle of an answer could come up inside gRPC, and be lost there or end everything.
        """

        def stop(signum: int, frame: FrameType | None) -> None:
            if not self._busy:
                signal.default_int_handler(signum, frame)
            self._stopped = True
            if self._answer is not None:
                self._answer.cancel()

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def switch(self, name: str) -> None:
        """Lets another adapter answer; ChorusError, and no change, where there is none of that name."""
        from chorus.client import expand

        if name:
            with adapter_suggestions(name, self._client.adapters):
                adapter, _, alias = expand(name).partition("/versions/")[0].partition("@")
                if alias not in {"", *self._client.adapter(adapter).aliases}:
                    raise NotFound(f"no alias {alias}", reason="ADAPTER_NOT_FOUND")
        self.adapter = name
        self._plain = False

    def _command(self, line: str) -> bool:
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "/adapter":
                self.switch(rest)
                _note(f"{rest or 'the base model'} answers from here on")
            case "/system":
                self._system = rest
                _note("system message set" if rest else "no system message")
            case "/reset":
                self._history.clear()
                _note("forgotten")
            case "/help":
                _note(HELP)
            case _:
                complain(f"no command {command}; /help tells them, and a space before the slash makes it a question")
                return False
        return True

    def _ask(self, question: str) -> bool:
        self._history.append({"role": "user", "content": question})
        text: list[str] = []
        try:
            try:
                self._read_answer(text)
            except FailedPrecondition as error:
                if error.reason != NO_TEMPLATE or self._plain:
                    raise
                self._plain = True
                _note("no chat template here: sending plain text, what was said joined line by line")
                self._read_answer(text)
            if self._stopped:
                _note("(stopped)")
        finally:
            answer = "".join(text)
            if answer:
                self._history.append({"role": "assistant", "content": answer})
            else:
                # A question without an answer would confuse the next one.
                self._history.pop()
        return True

    def _read_answer(self, text: list[str]) -> None:
        """Streams the answer to stdout and into `text`."""
        system: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        said = [*system, *self._history]
        prompt = "\n".join(message["content"] for message in said) + "\n" if self._plain else said
        with self._client.stream(prompt, adapter=self.adapter, **self._sampling) as answer:
            self._answer = answer
            if self._stopped:  # before there was anything to cancel
                answer.cancel()
            try:
                for delta in answer:
                    text.append(delta.text)
                    print(delta.text, end="", flush=True)
            finally:
                self._answer = None
                if text:
                    print(flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
