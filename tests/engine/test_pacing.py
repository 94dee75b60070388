"""What cannot wait is told at once; tokens in the middle of many answers go together."""

import pytest

from chorus.engine.messages import Early, Event, Failed, FinishReason, Loaded, StepEvents, StepStats, Tokens
from chorus.engine.pacing import LONGEST_S, Pacer, pace

STREAMS = 64


class Line:
    """A pacer behind an engine with many running requests, and its clock."""

    def __init__(self) -> None:
        self.posted: list[list[StepEvents | Early]] = []
        self.pacer = Pacer(lambda steps: self.posted.append(list(steps)))
        self.now = 1000.0

    def step(
        self, *events: Event, ran: bool = True, running: int = STREAMS, after: float = 0.001, prompts: bool = False
    ) -> None:
        """One turn of the engine, `after` seconds after the one before, all of which it computes."""
        self.pacer.before_computing(prompts, self.now)
        self.now += after
        self.pacer.take(StepEvents(events, StepStats(running=running), ran=ran, at=self.now))

    @property
    def told(self) -> list[int]:
        """The tokens of request 0 that were posted last, in order."""
        return self.told_of(0)

    def told_of(self, request_id: int) -> list[int]:
        events = [event for step in self.posted[-1] for event in step.events]
        return [token for e in events if isinstance(e, Tokens) and e.request_id == request_id for token in e.token_ids]


def everybody(token: int, *, first: bool = False) -> list[Event]:
    return [Tokens(i, (token,), first=first) for i in range(STREAMS)]


@pytest.fixture
def line() -> Line:
    """Every request has had its first token, just now."""
    line = Line()
    line.step(*everybody(5, first=True))
    assert line.told == [5]
    return line


def test_tokens_in_the_middle_of_many_answers_come_together(line: Line) -> None:
    line.step(*everybody(6))
    line.step(*everybody(7))
    assert len(line.posted) == 1
    line.step(*everybody(8), after=pace(STREAMS))
    assert len(line.posted) == 2
    assert line.told == [6, 7, 8]


def test_a_slow_engine_posts_every_step(line: Line) -> None:
    line.step(*everybody(6), after=pace(STREAMS))
    assert line.told == [6]


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (Tokens(3, (7,), FinishReason.LENGTH), [6, 7]),
        (Tokens(3, (7,), index=1, first=True), [6, 7]),
        (Tokens(99, (7,), first=True), []),
        (Failed(3, "INTERNAL", "BUG", "it broke"), [6]),
        (Loaded("d" * 64), []),
    ],
    ids=["an end", "another output's first token", "a first token", "an error", "of no request"],
)
def test_what_cannot_wait_takes_along_what_its_request_has_waiting(line: Line, event: Event, told: list[int]) -> None:
    line.step(*everybody(6))
    line.step(event, Tokens(0, (7,)))
    assert line.told_of(3) == told
    assert [e for step in line.posted[-1] for e in step.events][-1] == event
    assert line.told == []
    line.step(*everybody(8), after=pace(STREAMS))
    assert line.told == [6, 7, 8]
    assert line.told_of(3) == ([8] if told else [6, 8])
    assert not any(isinstance(e, type(event)) and e == event for step in line.posted[-1] for e in step.events)


def test_each_turn_is_told_once_whatever_goes_before_it(line: Line) -> None:
    """With its time; its numbers come with what could wait, also where nothing is left of it."""
    line.step(*everybody(6))
    first = line.now
    line.step(Tokens(3, (7,), FinishReason.LENGTH))
    assert [(type(step), step.at) for step in line.posted[-1]] == [(Early, first), (Early, line.now)]
    line.step(after=pace(STREAMS))
    assert [type(step) for step in line.posted[-1]] == [StepEvents] * 3
    assert line.posted[-1][0].at == first


@pytest.mark.parametrize("ending", [{"ran": False}, {"running": 0}])
def test_nothing_is_held_when_no_step_may_follow(line: Line, ending: dict[str, int]) -> None:
    line.step(*everybody(6), **ending)  # type: ignore[arg-type]
    assert line.told == [6]


def test_the_pause_grows_with_the_streams_and_stays_short() -> None:
    assert pace(1) < 0.002
    assert pace(1) < pace(32) < pace(10_000) == LONGEST_S


def test_what_waits_is_told_before_a_turn_that_takes_long_rather_than_late(line: Line) -> None:
    """Once such turns have been seen: with prompts they take three quarters of the time between messages."""
    due = pace(STREAMS)
    for _ in range(40):
        line.step(after=0.1 * due)
        line.step(after=0.75 * due, prompts=True)
    line.step(*everybody(6), after=due)
    for token in range(7, 14):
        line.step(*everybody(token), after=0.1 * due)
    posted = len(line.posted)
    line.step(*everybody(14), after=0.75 * due, prompts=True)  # 0.7 before, 1.45 after
    assert len(line.posted) == posted + 1
    assert line.told == [7, 8, 9, 10, 11, 12, 13]
    line.step(*everybody(15), after=0.1 * due)
    assert len(line.posted) == posted + 1
    line.step(*everybody(16), after=due)
    assert line.told == [14, 15, 16]


@pytest.mark.parametrize(("held", "told"), [(0.5, [7, 8]), (0.7, [7])])
def test_what_waits_is_told_when_it_is_nearer_to_its_time(line: Line, held: float, told: list[int]) -> None:
    """A turn with prompts takes 0.8: held for half of its time it is nearer after that, for 0.7 of it before."""
    due = pace(STREAMS)
    for _ in range(40):
        line.step(after=0.8 * due, prompts=True)
    line.step(*everybody(6), after=due)
    line.step(*everybody(7), after=held * due)
    posted = len(line.posted)
    line.step(*everybody(8), after=0.8 * due, prompts=True)
    assert len(line.posted) == posted + 1
    assert line.told == told
