"""Sends a trace to a live server: every request at its time, whether or not the ones before it have been answered."""

import asyncio
import random
import time
from collections.abc import Sequence

from chorus.client.aio import AsyncClient
from chorus.errors import ChorusError
from loads.figures import Outcome
from loads.trace import BASE, Arrival

TENANT = "bench"
TIMEOUT_S = 300.0


def adapter_name(index: int) -> str:
    return f"a{index:05}"


def prompt(arrival: Arrival, number: int, vocabulary: int) -> list[int]:
    """Random tokens that no other request has, so that no prefix is cached."""
    generator = random.Random(f"{number} {arrival}")
    return [generator.randrange(3, vocabulary) for _ in range(arrival.tokens_in)]


async def replay(client: AsyncClient, arrivals: Sequence[Arrival], vocabulary: int) -> list[Outcome]:
    """What became of each request. Answers run to their full length; a refused one is an outcome, not an exception."""
    await client.has_tokenizer()  # asked once; not during the run
    prompts = [prompt(arrival, i, vocabulary) for i, arrival in enumerate(arrivals)]
    began = time.perf_counter()

    async def one(arrival: Arrival, tokens: list[int]) -> Outcome:
        await asyncio.sleep(began + arrival.at - time.perf_counter())
        outcome = Outcome(due=arrival.at, sent=time.perf_counter() - began)
        name = "" if arrival.adapter == BASE else f"{TENANT}/{adapter_name(arrival.adapter)}"
        try:
            async with client.stream(
                tokens, adapter=name, timeout=TIMEOUT_S, max_tokens=arrival.tokens_out, temperature=0.0, ignore_eos=True
            ) as answer:
                async for delta in answer:
                    if delta.token_ids:
                        outcome.messages.append((time.perf_counter() - began, len(delta.token_ids)))
                outcome.adapter_wait = answer.result.timing.adapter_load
        except ChorusError as error:
            outcome.error = error.code
        return outcome

    return await asyncio.gather(*(one(*pair) for pair in zip(arrivals, prompts, strict=True)))
