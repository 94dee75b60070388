"""Versions that wait for room: who is read, who leaves, who comes first."""

from chorus.adapters.residency import AHEAD, Residency
from chorus.adapters.resident import LoadedHost
from chorus.errors import ResourceExhausted
from support.residency import InlineExecutor, load_by_name, make_pool


def test_what_nobody_asks_for_any_more_leaves_the_line() -> None:
    residency = Residency(make_pool(rows=16), load_by_name, executor=InlineExecutor(), forget_turns=5)
    residency.pin("held", "8")
    residency.advance()
    residency.request("abandoned", "16")
    residency.pin("pinned", "16")
    outcomes = []
    for _ in range(10):
        assert residency.acquire("wanted", "8") is None
        outcomes += residency.advance()
    assert {r.digest for r in residency.residents()} == {"held", "pinned", "wanted"}
    ((digest, error, _),) = outcomes
    assert digest == "abandoned"
    assert isinstance(error, ResourceExhausted)
    assert (error.reason, error.retry_after_s) == ("NO_ADAPTER_ROOM", 1.0)
    residency.unpin("pinned")
    residency.request("wanted", "8")
    outcomes = residency.advance()
    assert [(o.digest, o.error is None) for o in outcomes] == [("pinned", False)]
    residency.request("wanted", "8")
    assert [(o.digest, o.error) for o in residency.advance()] == [("wanted", None)]


def test_only_the_first_in_line_take_host_memory_and_all_get_their_turn() -> None:
    read: list[str] = []

    def load(digest: str, path: str) -> LoadedHost:
        read.append(digest)
        return load_by_name(digest, path)

    residency = Residency(make_pool(rows=8), load, executor=InlineExecutor())
    residency.pin("held", "8")
    residency.advance()
    newcomers = [f"v{i}" for i in range(AHEAD + 3)]
    for digest in newcomers:
        residency.request(digest, "8")
    residency.advance()
    assert read == ["held", *newcomers[:AHEAD]]
    assert sum(r.host is not None for r in residency.residents()) == AHEAD
    residency.unpin("held")
    came: list[str] = []
    for _ in range(10 * len(newcomers)):
        came += [outcome.digest for outcome in residency.advance() if outcome.error is None]
        residency.check_integrity()
    assert came == newcomers


def test_a_failure_in_line_lets_the_next_be_read() -> None:
    residency = Residency(make_pool(), load_by_name, executor=InlineExecutor())
    for i in range(2 * AHEAD):
        residency.request(f"bad-{i}", "bad")
    residency.request("good", "8")
    outcomes = [outcome for _ in range(3) for outcome in residency.advance()]
    assert [outcome.error is None for outcome in outcomes] == [False] * 2 * AHEAD + [True]
