"""Faults 17 and 18: an adapter is deleted, its alias moves, its weights are replaced, all while it answers."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from chorus.client import Client, Stream
from chorus.errors import NotFound
from support.claims import assert_solo_greedy, until
from support.server import ServerProcess
from support.worlds import PROMPT, TinyWorld

LONG: dict[str, Any] = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}
SHORT: dict[str, Any] = {**LONG, "max_tokens": 16}


def refs(client: Client, digest: str) -> int | None:
    """How many running requests hold a version; None if it is not in memory."""
    return next((version.refs for version in client.residency().versions if version.digest == digest), None)


def begin(client: Client, adapter: str) -> tuple[Stream, list[int]]:
    """A long stream and its first tokens."""
    stream = client.stream(PROMPT, adapter=adapter, **LONG)
    return stream, list(next(stream).token_ids)


def rest(stream: Stream, first: Sequence[int]) -> list[int]:
    tokens = list(first)
    for delta in stream:
        tokens += delta.token_ids
    assert len(tokens) == LONG["max_tokens"]
    return tokens


def test_stream_ends_on_its_version_though_its_adapter_is_deleted(
    calm: ServerProcess, client: Client, world: TinyWorld
) -> None:
    pushed = client.push(world.adapter("doomed"), tenant="t17", name="doomed")
    blob = calm.state_dir / "blobs" / "sha256" / pushed.digest[:2] / pushed.digest
    before = client.residency().totals
    stream, first = begin(client, "t17/doomed")
    client.delete("t17/doomed")
    assert refs(client, pushed.digest) == 1, "the stream ended before the delete: nothing was tested"

    # New calls see the new state at once, by every name.
    for name in ("t17/doomed", "t17/doomed@live", pushed.version):
        with pytest.raises(NotFound):
            client.generate(PROMPT, adapter=name, **SHORT)
    assert client.list_adapters("t17") == ()

    assert_solo_greedy(world.base, world.adapter("doomed"), PROMPT, rest(stream, first))
    assert stream.result.version == pushed.version

    # Then memory and disk come back.
    until(lambda: refs(client, pushed.digest) is None, "the version leaves memory")
    until(lambda: not blob.exists(), "the files leave the disk")
    after = client.residency().totals
    assert after.kv_blocks_used == 0
    assert (after.rows_used, after.bytes_used) == (before.rows_used, before.bytes_used)


def test_stream_ends_on_its_version_though_the_alias_moves(client: Client, world: TinyWorld) -> None:
    old, new = world.adapter("old"), world.adapter("new")
    before = client.push(old, tenant="t17", name="moved")
    after = client.push(new, tenant="t17", name="moved", alias=None)
    stream, first = begin(client, "t17/moved")
    client.set_alias("t17/moved", "live", after.digest)
    answer = client.generate(PROMPT, adapter="t17/moved", **SHORT)
    assert refs(client, before.digest) == 1, "the stream ended before the alias moved: nothing was tested"

    assert_solo_greedy(world.base, new, PROMPT, answer.token_ids)
    assert answer.version == after.version
    assert_solo_greedy(world.base, old, PROMPT, rest(stream, first))
    assert stream.result.version == before.version

    # And back: a roll-back is the same move.
    client.set_alias("t17/moved", "live", before.digest)
    answer = client.generate(PROMPT, adapter="t17/moved", **SHORT)
    assert_solo_greedy(world.base, old, PROMPT, answer.token_ids)


def test_call_that_waits_for_its_load_is_answered_though_its_adapter_is_deleted(
    restarted: ServerProcess, world: TinyWorld
) -> None:
    """`restarted` takes 1.5 s a load: the files are still to be read when the last name for them goes."""
    with restarted.client() as client, ThreadPoolExecutor(1) as threads:
        pushed = client.push(world.adapter("awaited"), tenant="t17", name="awaited")
        blob = restarted.state_dir / "blobs" / "sha256" / pushed.digest[:2] / pushed.digest
        call = threads.submit(client.generate, PROMPT, adapter="t17/awaited", **SHORT)
        until(lambda: restarted.scrape().value("chorus_requests_waiting_for_adapter") == 1, "the call waits")
        client.delete("t17/awaited")
        assert not call.done()
        assert blob.exists()
        assert_solo_greedy(world.base, world.adapter("awaited"), PROMPT, call.result(30).token_ids)
        until(lambda: refs(client, pushed.digest) is None, "the version leaves memory")
        until(lambda: not blob.exists(), "the files leave the disk")


def test_new_weights_under_the_same_name_answer_at_once(client: Client, world: TinyWorld) -> None:
    versions = []
    for name in ("first", "second", "third"):
        folder = world.adapter(name)
        versions.append((folder, client.push(folder, tenant="t18", name="same")))
        # The same prompt each time: keys and values of the version before would fit it.
        answer = client.generate(PROMPT, adapter="t18/same", **SHORT)
        assert_solo_greedy(world.base, folder, PROMPT, answer.token_ids)
        assert answer.version == versions[-1][1].version
    answers = set()
    for folder, pushed in versions:
        answer = client.generate(PROMPT, adapter=pushed.version, **SHORT)
        assert_solo_greedy(world.base, folder, PROMPT, answer.token_ids)
        answers.add(answer.token_ids)
    assert len(answers) == 3, "the adapters do not differ: nothing was tested"


def test_adapter_made_anew_after_its_delete_answers_with_its_new_weights(client: Client, world: TinyWorld) -> None:
    client.push(world.adapter("first"), tenant="t18", name="again")
    client.generate(PROMPT, adapter="t18/again", **SHORT)
    client.delete("t18/again")
    client.push(world.adapter("second"), tenant="t18", name="again")
    answer = client.generate(PROMPT, adapter="t18/again", **SHORT)
    assert_solo_greedy(world.base, world.adapter("second"), PROMPT, answer.token_ids)
    # The same weights once more: memory may still know them, the answer is the same.
    client.delete("t18/again")
    client.push(world.adapter("second"), tenant="t18", name="again")
    assert client.generate(PROMPT, adapter="t18/again", **SHORT).token_ids == answer.token_ids
