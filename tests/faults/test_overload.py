"""Faults 22 and 27: deadlines in the queue and in the batch, more than fits."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import pytest

from chorus.client import Client, Stream
from chorus.errors import ChorusError, DeadlineExceeded, ResourceExhausted
from faults.idleness import is_idle, steps_once_heard
from support.claims import until
from support.scrape import Scrape
from support.server import ServerProcess
from support.worlds import PROMPT

ROWS, QUEUE = 4, 4  # of the server
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
STEPS, TOKENS = "chorus_engine_steps_total", "chorus_generation_tokens_total"
STARTED = "chorus_request_queue_time_seconds_count"


def grown(name: str, before: Scrape, after: Scrape, **labels: str) -> float:
    return after.value(name, **labels) - before.value(name, **labels)


@contextmanager
def full_batch(client: Client) -> Iterator[list[Stream]]:
    """Every row is taken by a stream that has begun, for some 200 steps."""
    streams = [client.stream(PROMPT, max_tokens=200, **GREEDY) for _ in range(ROWS)]
    try:
        for stream in streams:
            next(stream)
        yield streams
    finally:
        for stream in streams:
            stream.cancel()


def test_deadline_in_the_queue_ends_the_call_and_no_step_has_seen_it(narrow: ServerProcess) -> None:
    until(lambda: is_idle(narrow), "nobody else is there")
    before = narrow.scrape()
    with narrow.client() as client, full_batch(client):
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.generate(PROMPT[::-1], max_tokens=4, timeout=0.3, **GREEDY)
        assert time.monotonic() - began < 10
        until(lambda: narrow.scrape().value("chorus_requests_waiting") == 0, "it leaves the queue")
        assert narrow.scrape().value("chorus_requests_running") == ROWS, "the batch is over: nothing was tested"
    until(lambda: is_idle(narrow), "the batch is over")
    # The streams of the batch were started, and nothing else ever was.
    assert grown(STARTED, before, narrow.scrape()) == ROWS


def test_deadline_of_a_running_call_gives_everything_back_within_two_steps(narrow: ServerProcess) -> None:
    until(lambda: is_idle(narrow), "nobody else is there")
    with narrow.client() as client:
        before = narrow.scrape()
        with pytest.raises(DeadlineExceeded):
            client.generate(PROMPT, max_tokens=200, timeout=1.5, **GREEDY)
        steps = steps_once_heard(narrow, client, before)
        assert 2 < grown(STEPS, before, narrow.scrape()) < 150, "it was not cut short while it ran"
        until(lambda: is_idle(narrow), "pages are back")
    assert narrow.scrape().value(STEPS) - steps <= 2


@dataclass(frozen=True)
class Outcome:
    """What one of many callers got."""

    tokens: int
    seconds: float
    error: ChorusError | None


def call_at_once(client: Client, callers: int) -> list[Outcome]:
    def call(number: int) -> Outcome:
        began = time.monotonic()
        try:
            answer = client.generate(PROMPT, max_tokens=40, timeout=60, **GREEDY)
        except ChorusError as error:
            return Outcome(0, time.monotonic() - began, error)
        return Outcome(len(answer.token_ids), time.monotonic() - began, None)

    with ThreadPoolExecutor(callers) as threads:
        return list(threads.map(call, range(callers)))


def test_burst_of_ten_times_the_capacity_costs_the_accepted_nothing(narrow: ServerProcess) -> None:
    """Counted in tokens a step, which no busy machine can spoil."""
    until(lambda: is_idle(narrow), "nobody else is there")
    with narrow.client() as client:
        start = narrow.scrape()
        quiet = call_at_once(client, ROWS)
        between = narrow.scrape()
        burst = call_at_once(client, 10 * (ROWS + QUEUE))
        until(lambda: is_idle(narrow), "all are answered")
        end = narrow.scrape()
    assert [outcome.tokens for outcome in quiet] == [40] * ROWS
    accepted = [outcome for outcome in burst if outcome.error is None]
    turned_away = [outcome for outcome in burst if outcome.error is not None]
    # Who is accepted gets everything.
    assert len(accepted) >= QUEUE
    assert {outcome.tokens for outcome in accepted} == {40}
    # Who is not hears of it long before the work at hand is done, and when to come again.
    assert len(turned_away) >= 5 * (ROWS + QUEUE)
    for outcome in turned_away:
        assert isinstance(outcome.error, ResourceExhausted), outcome
        assert outcome.error.reason == "QUEUE_FULL"
        assert outcome.error.retry_after_s
    waits = sorted(outcome.seconds for outcome in turned_away)
    assert waits[len(waits) // 2] < min(outcome.seconds for outcome in accepted)
    # And the engine did not work for those it turned away.
    assert grown(TOKENS, between, end) == 40 * len(accepted)
    # A batch may have less than all rows at the end, when nobody is there any more who wants them.
    batches, quiet_steps, steps = ceil(len(accepted) / ROWS), grown(STEPS, start, between), grown(STEPS, between, end)
    assert 0.9 * steps <= batches * quiet_steps, f"{steps:g} steps for {batches} batches, {quiet_steps:g} for one alone"
