"""More adapters than fit into their memory: they take turns, and nobody can tell from the answers."""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from chorus.client import Client, Completion
from support.claims import assert_solo_greedy, until
from support.server import ServerProcess
from support.worlds import PROMPT, TinyWorld

GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
# Ranks that add up to more than twice the 80 rank rows of a site; together at most two of the large ones fit.
RANKS = {f"lru-{number}-{rank}": rank for number, rank in enumerate((8, 16, 32, 4, 24, 8, 40, 16, 32))}
CALLS = 36
AT_ONCE = 6


def test_answers_are_the_oracles_while_adapters_take_turns(
    tiny: ServerProcess, client: Client, world: TinyWorld
) -> None:
    for name, rank in RANKS.items():
        client.push(world.adapter(name, r=rank), tenant="lru", name=name)
    before = tiny.scrape()
    order = [*RANKS] * (CALLS // len(RANKS))
    random.Random(5).shuffle(order)

    def ask(name: str) -> Completion:
        return client.generate(PROMPT, adapter=f"lru/{name}", **GREEDY)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        answers = list(threads.map(ask, order))
    for name, answer in zip(order, answers, strict=True):
        assert_solo_greedy(world.base, world.adapter(name, r=RANKS[name]), PROMPT, answer.token_ids)
    after = tiny.scrape()
    evictions = "chorus_adapter_evictions_total"
    assert after.value(evictions, tier="device") - before.value(evictions, tier="device") > len(RANKS)

    found = client.residency()
    assert found.totals.bytes_used <= found.totals.bytes_total <= 1 << 20
    assert found.totals.rows_used == sum(version.rank_rows for version in found.versions if version.tier == "device")


def test_memory_is_empty_once_all_adapters_are_deleted(tiny: ServerProcess, client: Client) -> None:
    for adapter in client.list_adapters():
        client.delete(adapter.name)
    until(lambda: client.residency().versions == (), "all versions leave memory")
    totals = client.residency().totals
    assert (totals.rows_used, totals.bytes_used, totals.kv_blocks_used) == (0, 0, 0)
    assert not list((tiny.state_dir / "blobs" / "sha256").glob("*/*"))
