"""Fault 21: the caller goes away, wherever its request is just then."""

import json
import signal
import subprocess
from typing import Any

from chorus.client import Client, ResidentVersion
from faults.idleness import held, steps_once_heard
from support.claims import assert_solo_greedy, until
from support.server import CHORUS, ServerProcess
from support.worlds import PROMPT, TinyWorld

# The server takes 0.1 s a step and 1.5 s a load, and has two rows.
LONG: dict[str, Any] = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}
STEPS = "chorus_engine_steps_total"
AT_MOST = 2


def resident(client: Client, digest: str) -> ResidentVersion | None:
    return next((version for version in client.residency().versions if version.digest == digest), None)


def assert_idle(server: ServerProcess) -> None:
    now = server.scrape()
    for gauge in ("requests_running", "requests_waiting", "requests_waiting_for_adapter", "kv_cache_usage_ratio"):
        assert now.value(f"chorus_{gauge}") == 0, gauge


def test_killed_client_holds_nothing_two_steps_later(restarted: ServerProcess, world: TinyWorld) -> None:
    ids = ",".join(map(str, PROMPT))
    options = ("--server", restarted.inference, "--adapter", "t30/streaming", "--token-ids", ids, "--temperature", "0")
    many = ("--max-tokens", "200", "--ignore-eos", "--json", "--stream")
    with restarted.client() as client:
        command = [*CHORUS, "generate", *options, *many]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
            assert caller.stdout is not None
            assert json.loads(caller.stdout.readline())["delta"]["token_ids"]
            assert held(client) > 0
            before = restarted.scrape()
            caller.send_signal(signal.SIGKILL)
        steps = steps_once_heard(restarted, client, before)
        until(lambda: held(client) == 0, "pages and references are back")
    assert restarted.scrape().value(STEPS) - steps <= AT_MOST
    assert_idle(restarted)


def test_cancelled_stream_holds_nothing_two_steps_later(restarted: ServerProcess) -> None:
    with restarted.client() as client:
        with client.stream(PROMPT, **LONG) as stream:
            next(stream)
            assert held(client) > 0
            before = restarted.scrape()
        steps = steps_once_heard(restarted, client, before)
        until(lambda: held(client) == 0, "pages are back")
    assert restarted.scrape().value(STEPS) - steps <= AT_MOST
    assert_idle(restarted)


def test_cancel_in_the_queue_is_never_scheduled_and_disturbs_nobody(restarted: ServerProcess, world: TinyWorld) -> None:
    before = restarted.scrape()
    with restarted.client() as client:
        running = [client.stream(PROMPT, adapter=name, **{**LONG, "max_tokens": 25}) for name in ("", "t30/streaming")]
        first = [next(stream).token_ids for stream in running]
        queued = client.stream(PROMPT, adapter="t30/streaming", **LONG)
        until(lambda: restarted.scrape().value("chorus_requests_waiting") == 1, "the third one waits")
        queued.cancel()
        steps = steps_once_heard(restarted, client, before)
        until(lambda: restarted.scrape().value("chorus_requests_waiting") == 0, "the queue is empty")
        assert restarted.scrape().value(STEPS) - steps <= AT_MOST
        for stream, tokens, folder in zip(running, first, (None, world.adapter("streaming")), strict=True):
            rest = [token for delta in stream for token in delta.token_ids]
            assert_solo_greedy(world.base, folder, PROMPT, [*tokens, *rest])
        until(lambda: held(client) == 0, "pages and references are back")
    after = restarted.scrape()
    started = "chorus_request_queue_time_seconds_count"
    assert after.value(started) - before.value(started) == 2
    aborted = [scrape.value("chorus_requests_finished_total", reason="aborted") for scrape in (before, after)]
    assert aborted[1] - aborted[0] == 1
    assert_idle(restarted)


def test_cancel_during_the_load_holds_nothing_and_the_load_is_not_lost(
    restarted: ServerProcess, world: TinyWorld
) -> None:
    with restarted.client() as client:
        digest = client.push(world.adapter("late"), tenant="t21", name="late").digest
        steps = restarted.scrape().value(STEPS)
        with client.stream(PROMPT, adapter="t21/late", **LONG):
            until(lambda: restarted.scrape().value("chorus_requests_waiting_for_adapter") == 1, "it waits")
            version = resident(client, digest)
            assert version is not None
            assert version.tier == "loading"
        until(lambda: restarted.scrape().value("chorus_requests_waiting") == 0, "the queue is empty")
        assert held(client) == 0
        assert restarted.scrape().value(STEPS) == steps
        assert_idle(restarted)

        def on_device() -> bool:
            version = resident(client, digest)
            return version is not None and version.tier == "device"

        until(on_device, "the load ends")
        assert held(client) == 0
        answer = client.generate(PROMPT, adapter="t21/late", **{**LONG, "max_tokens": 8})
        assert_solo_greedy(world.base, world.adapter("late"), PROMPT, answer.token_ids)
        assert answer.timing.adapter_load < 1.0, "it was loaded again"


def test_adapter_deleted_while_it_loads_leaves_nothing(restarted: ServerProcess, world: TinyWorld) -> None:
    with restarted.client() as client:
        before = client.residency().totals
        pushed = client.push(world.adapter("gone"), tenant="t21", name="gone")
        with client.stream(PROMPT, adapter="t21/gone", **LONG):
            until(lambda: resident(client, pushed.digest) is not None, "the load begins")
            client.delete("t21/gone")
        blob = restarted.state_dir / "blobs" / "sha256" / pushed.digest[:2] / pushed.digest
        until(lambda: resident(client, pushed.digest) is None, "it leaves memory")
        until(lambda: not blob.exists(), "it leaves the disk")
        assert client.residency().totals == before
        # The loader's thread is free for others, and finds their files.
        client.push(world.adapter("gone"), tenant="t21", name="again")
        answer = client.generate(PROMPT, adapter="t21/again", **{**LONG, "max_tokens": 8})
        assert_solo_greedy(world.base, world.adapter("gone"), PROMPT, answer.token_ids)
