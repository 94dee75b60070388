"""Finite weights that overflow in the forward pass cost their own request and nothing else."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest

from chorus.client import Client
from chorus.errors import InternalError
from support.claims import assert_solo_greedy, until
from support.server import ServerProcess
from support.worlds import PROMPT, TinyWorld, fill

GREEDY: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
ROWS = 4
NEIGHBOURS = ("r8", "r4", "")
# Squared, 1e30 overflows at once; 1e18 leaves keys and values of about 1e37, and only what is made of them overflows.
POISONS = {
    "everywhere": (1e30, ""),
    "infinite keys": (1e30, "k_proj"),
    "huge keys": (1e18, "k_proj"),
    "infinite values": (1e30, "v_proj"),
    "huge values": (1e18, "v_proj"),
}


# The cache keeps no infinities, so these may end in nonsense of their own instead of an error.
SWALLOWED = ("k_proj", "v_proj")


def outcome(client: Client, temperature: float) -> str:
    """The reason why the poisoned request failed; empty if it got through."""
    try:
        client.generate(PROMPT[::-1], adapter="bad/poison", **{**GREEDY, "temperature": temperature, "max_tokens": 8})
    except InternalError as error:
        return error.reason
    return ""


@pytest.mark.parametrize(("value", "only"), POISONS.values(), ids=POISONS)
def test_poisoned_adapter_costs_only_its_own_request(
    calm: ServerProcess, client: Client, world: TinyWorld, value: float, only: str
) -> None:
    folders = {"": None, "r8": world.adapter("r8"), "r4": world.adapter("r4", r=4)}
    for name in ("r8", "r4"):
        client.push(folders[name] or world.base, tenant="good", name=name)
    bad = world.copy(world.adapter("r8"), "poison")
    fill(bad, value, only=only)
    client.push(bad, tenant="bad", name="poison")

    under_way = Barrier(len(NEIGHBOURS) + 1)

    def neighbour(name: str) -> list[int]:
        with client.stream(PROMPT, adapter=name and f"good/{name}", **{**GREEDY, "max_tokens": 120}) as stream:
            tokens = list(next(stream).token_ids)
            under_way.wait(30)
            for delta in stream:
                tokens += delta.token_ids
        return tokens

    with ThreadPoolExecutor(len(NEIGHBOURS)) as threads:
        answers = {name: threads.submit(neighbour, name) for name in NEIGHBOURS}
        under_way.wait(30)
        # Sampling too: what is drawn from is not what is compared.
        reasons = [outcome(client, temperature) for temperature in (0.0, 1.0)]
        beside = calm.scrape().value("chorus_requests_running")
        for name, answer in answers.items():
            assert_solo_greedy(world.base, folders[name], PROMPT, answer.result(30))
    assert beside == len(NEIGHBOURS), "nobody was beside it: nothing was tested"
    if only not in SWALLOWED:
        assert reasons == ["NOT_FINITE", "NOT_FINITE"]

    # Its pages are clean for whoever gets them next: these requests take every page of the cache.
    until(lambda: client.residency().totals.kv_blocks_used == 0, "all pages are free")
    long = (PROMPT * 20)[:190]
    with ThreadPoolExecutor(ROWS) as threads:
        for tokens in threads.map(lambda _: client.generate(long, adapter="good/r8", **GREEDY).token_ids, range(8)):
            assert_solo_greedy(world.base, folders["r8"], long, tokens)
    client.delete("bad/poison")
    client.delete("good/r8")
    client.delete("good/r4")
