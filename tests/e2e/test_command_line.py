"""The command line against a running server, as a script would use it: JSON out, exit codes, pieces as they come."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from support.claims import assert_solo_greedy
from support.server import CHORUS, ServerProcess, run_command
from support.worlds import PROMPT, TinyWorld

TEXT = "Message: This is Tom from Berlin. Please send me 4 lamps. Thank you.\nCity:"
GREEDY = ("--temperature", "0", "--ignore-eos")
Admin = Callable[..., dict[str, Any]]


@pytest.fixture
def admin(tiny: ServerProcess) -> Admin:
    """Runs `chorus adapters ... --json` and reads what it printed."""

    def run(*arguments: str) -> dict[str, Any]:
        done = run_command("adapters", *arguments, "--admin", tiny.admin, "--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        [line] = done.stdout.splitlines()
        answer: dict[str, Any] = json.loads(line)
        return answer

    return run


def test_life_of_an_adapter_on_the_command_line(tiny: ServerProcess, admin: Admin, world: TinyWorld) -> None:
    def answer(name: str) -> dict[str, Any]:
        ids = ",".join(map(str, PROMPT))
        options = ("--server", tiny.inference, "--adapter", name, "--token-ids", ids, "--max-tokens", "8", *GREEDY)
        done = run_command("generate", *options, "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    first = admin("push", str(world.adapter("first")), "--tenant", "cli", "--name", "life")
    second = admin("push", str(world.adapter("second")), "--tenant", "cli", "--name", "life", "--alias", "canary")
    [listed] = admin("list", "--tenant", "cli")["adapters"]
    assert listed["name"] == "tenants/cli/adapters/life"
    assert listed["aliases"] == {"live": first["digest"], "canary": second["digest"]}
    assert listed["version_count"] == 2
    versions = admin("versions", "cli/life")["versions"]
    assert [version["digest"] for version in versions] == [first["digest"], second["digest"]]

    assert_solo_greedy(world.base, world.adapter("second"), PROMPT, answer("cli/life@canary")["token_ids"])
    moved = admin("alias", "cli/life", "live", second["digest"], "--etag", listed["etag"])
    assert moved["aliases"]["live"] == second["digest"]
    live = answer("cli/life")
    assert_solo_greedy(world.base, world.adapter("second"), PROMPT, live["token_ids"])
    assert live["version"] == second["version"]

    resident = {version["digest"]: version for version in admin("residency")["versions"]}
    assert resident[second["digest"]]["tier"] == "device"
    assert resident[second["digest"]]["hits"] == 2
    assert resident[second["digest"]]["names"] == [second["version"]]
    assert admin("delete", "cli/life") == {"deleted": "tenants/cli/adapters/life"}
    assert admin("list", "--tenant", "cli") == {"adapters": []}
    assert second["digest"] not in {version["digest"] for version in admin("residency")["versions"]}


def test_generate_prints_every_documented_key(embedded: ServerProcess) -> None:
    options = ("--server", embedded.inference, "--prompt", TEXT, "--max-tokens", "12", *GREEDY, "--json")
    done = run_command("generate", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"token_ids", "text", "finish_reason", "usage", "timing", "version"}
    assert set(found["usage"]) == {"prompt_tokens", "cached_tokens", "completion_tokens"}
    assert set(found["timing"]) == {"queue", "adapter_load", "first_token", "total"}
    assert found["finish_reason"] == "length"
    assert len(found["token_ids"]) == found["usage"]["completion_tokens"] == 12
    assert found["text"]
    assert found["version"] == ""
    timing = found["timing"]
    assert 0 <= timing["queue"] <= timing["first_token"] <= timing["total"] < 60


def test_stream_prints_as_it_comes(embedded: ServerProcess) -> None:
    options = ("--server", embedded.inference, "--prompt", TEXT, "--max-tokens", "120", *GREEDY)
    command = [*CHORUS, "generate", *options, "--stream"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as printing:
        assert printing.stdout is not None
        assert printing.stderr is not None
        start = printing.stdout.read1(1 << 16)  # type: ignore[attr-defined]
        # 120 steps take 1.2 s at least: nobody has waited for the end.
        assert embedded.scrape().value("chorus_requests_running") == 1, "it was printed at the end"
        whole = start + printing.stdout.read()
        summary = printing.stderr.read().decode()
    assert printing.returncode == 0, summary
    assert 0 < len(start) < len(whole)
    done = run_command("generate", *options)
    assert whole.decode() == done.stdout
    assert "120 tokens" in summary


def test_json_pieces_add_up_to_the_whole(embedded: ServerProcess) -> None:
    options = ("--server", embedded.inference, "--prompt", TEXT, "--max-tokens", "40", *GREEDY, "--json", "--stream")
    done = run_command("generate", *options)
    *pieces, whole = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(pieces) > 1
    assert "".join(piece["delta"]["text"] for piece in pieces) == whole["text"]
    assert [token for piece in pieces for token in piece["delta"]["token_ids"]] == whole["token_ids"]


def test_error_is_one_line_with_code_and_reason_and_exit_code_1(tiny: ServerProcess) -> None:
    options = ("--server", tiny.inference, "--adapter", "nobody/nothing", "--token-ids", "3", "--json")
    done = run_command("generate", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "chorus: NOT_FOUND (ADAPTER_NOT_FOUND): no such adapter, alias or version; tenant nobody has no adapters\n"
    )
