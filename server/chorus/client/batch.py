"""Many requests, a few at a time: bounded concurrency, tries again where the server is busy, one outcome for each.

    requests ─> `concurrency` workers ─> AsyncClient ─> outcomes, in the order in which they end

Knows nothing of files: `client.batch_file` reads requests from one and writes outcomes to another.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from chorus.client.aio import AsyncClient
from chorus.client.requests import Prompt, Sampling
from chorus.client.results import Completion
from chorus.errors import ChorusError, ResourceExhausted, Unavailable

# Tries and pauses of one request: about a minute in all, unless the server asks for longer pauses.
MAX_ATTEMPTS = 8
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 16.0
UNREACHABLE = "UNREACHABLE"


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request; `id` tells its outcome from the others'."""

    id: str
    prompt: Prompt
    adapter: str = ""
    priority: int | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """What became of one: a completion, or else the error of the last of `attempts`."""

    request: BatchRequest
    completion: Completion | None
    error: ChorusError | None
    attempts: int


async def run_batch(
    client: AsyncClient,
    requests: Iterable[BatchRequest],
    *,
    concurrency: int = 16,
    timeout: float | None = None,  # noqa: ASYNC109 - of each request
    pause: Callable[[float], float] = lambda seconds: seconds * random.uniform(0.75, 1.25),
) -> AsyncGenerator[BatchOutcome, None]:
    """Runs them all, at most `concurrency` at once; yields outcomes as they come. `timeout` is each try's.

    A request is tried again on UNAVAILABLE and RESOURCE_EXHAUSTED, after the pause that the server asks for or a
    growing one; any other error is its outcome, and the rest go on. `pause` spreads a pause that was decided.

    Raises:
        Unavailable: with reason UNREACHABLE, once a request has used up its tries and nobody listens there.
        ValueError: `concurrency` is not positive.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, not {concurrency}")
    waiting: Iterator[BatchRequest] = iter(requests)
    running: set[asyncio.Task[BatchOutcome]] = set()
    try:
        while True:
            while len(running) < concurrency and (request := next(waiting, None)) is not None:
                running.add(asyncio.create_task(_run_one(client, request, timeout, pause)))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            broken = [error for task in done if (error := task.exception()) is not None]
            for task in done:
                if task.exception() is None:
                    yield task.result()
            if broken:
                raise broken[0]
    finally:
        for task in running:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*running, return_exceptions=True)


async def _run_one(
    client: AsyncClient,
    request: BatchRequest,
    timeout: float | None,  # noqa: ASYNC109
    pause: Callable[[float], float],
) -> BatchOutcome:
    attempt = 0
    while True:
        attempt += 1
        try:
            completion = await client.generate(
                request.prompt,
                adapter=request.adapter,
                priority=request.priority,
                timeout=timeout,
                **request.sampling,
            )
        except (Unavailable, ResourceExhausted) as error:
            if attempt == MAX_ATTEMPTS:
                if error.reason == UNREACHABLE:
                    raise
                return BatchOutcome(request, None, error, attempt)
            asked = error.retry_after_s or 0.0
            await asyncio.sleep(max(asked, pause(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)))))
        except ChorusError as error:
            return BatchOutcome(request, None, error, attempt)
        else:
            return BatchOutcome(request, completion, None, attempt)
