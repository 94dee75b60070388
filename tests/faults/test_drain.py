"""Fault 30: SIGTERM while streams run and adapters load, and the start after it."""

import dataclasses

from faults.draining import GREEDY, NOT_SERVING, SERVING, Cut, Drain
from support.claims import assert_solo_greedy
from support.server import ServerProcess
from support.worlds import PROMPT, TinyWorld


def test_health_flips_before_the_first_call_is_refused(drain: Drain) -> None:
    assert drain.watched == [SERVING, NOT_SERVING]
    assert drain.health_at_refusal == NOT_SERVING


def test_late_call_is_unavailable_and_told_when_to_try_again(drain: Drain) -> None:
    assert (drain.refusal.code, drain.refusal.reason) == ("UNAVAILABLE", "DRAINING")
    assert drain.refusal.retry_after_s
    assert drain.under_way_at_refusal == 2, "nothing was under way: nothing was tested"


def test_stream_under_way_gets_all_its_tokens(drain: Drain, world: TinyWorld) -> None:
    assert drain.streaming is not None
    assert drain.streaming.finish_reason == "length"
    assert len(drain.streaming.token_ids) == drain.streaming.usage.completion_tokens == 25
    assert_solo_greedy(world.base, world.adapter("streaming"), PROMPT, drain.streaming.token_ids)


def test_call_that_waits_for_its_adapter_gets_all_its_tokens(drain: Drain, world: TinyWorld) -> None:
    assert drain.loading is not None
    assert len(drain.loading.token_ids) == 8
    assert_solo_greedy(world.base, world.adapter("loading"), PROMPT, drain.loading.token_ids)


def test_drained_server_exits_with_0(drain: Drain) -> None:
    assert drain.exit_code == 0, drain.log


def test_load_that_outlasts_the_grace_ends_its_call_and_not_the_exit(cut: Cut) -> None:
    assert cut.error is not None
    assert (cut.error.code, cut.error.reason) == ("UNAVAILABLE", "DRAINING")
    assert cut.exit_code == 0
    assert cut.seconds < 20, "the load takes 30"


def test_adapters_are_listed_and_served_after_the_restart(
    drain: Drain, restarted: ServerProcess, world: TinyWorld
) -> None:
    with restarted.client() as client:
        assert [dataclasses.asdict(a) for a in client.list_adapters()] == [
            dataclasses.asdict(a) for a in drain.adapters
        ]
        for name in ("streaming", "loading"):
            answer = client.generate(PROMPT, adapter=f"t30/{name}", max_tokens=8, **GREEDY)
            assert_solo_greedy(world.base, world.adapter(name), PROMPT, answer.token_ids)
