from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from typer.testing import Result

from chorus.admin.v1 import adapters_pb2
from chorus.v1 import adapter_pb2, inference_pb2
from client.fake_chorus import FakeChorus, error_status

Run = Callable[..., Result]
RunJson = Callable[..., Any]
DIGEST = "ab" * 32
NAME = "tenants/acme/adapters/support"
VERSION = f"{NAME}/versions/{DIGEST}"
ADAPTER = adapter_pb2.Adapter(
    name=NAME,
    aliases={"live": DIGEST},
    etag="e1",
    create_time=Timestamp(seconds=1),
    update_time=Timestamp(seconds=2),
    version_count=3,
)
STORED = adapter_pb2.AdapterVersion(
    name=VERSION, digest=DIGEST, kind="LORA", max_rank=8, size_bytes=4096, create_time=Timestamp(seconds=1), pinned=True
)
PUSHED = adapters_pb2.CreateAdapterVersionResponse(version=STORED, adapter=ADAPTER, created=True)
RESIDENCY = adapters_pb2.GetResidencyResponse(
    versions=[
        adapters_pb2.ResidentVersion(
            digest=DIGEST, tier=adapters_pb2.TIER_DEVICE, bytes=2048, rank_rows=56, max_rank=8, refs=1, names=[VERSION]
        )
    ],
    rows_total=1000,
    rows_used=56,
    bytes_total=1 << 20,
    bytes_used=2048,
    kv_blocks_total=64,
    kv_blocks_used=3,
)
PUSH = "Adapters.CreateAdapterVersion"


def push(fake: FakeChorus, folder: Path, *more: str) -> tuple[object, ...]:
    return "adapters", "push", folder, "--tenant", "acme", "--name", "support", "--admin", fake.address, *more


def test_push_prints_what_was_stored(fake: FakeChorus, run_json: RunJson, folder: Path) -> None:
    fake.answer(PUSH, PUSHED)
    assert run_json(*push(fake, folder)) == {
        "name": NAME,
        "digest": DIGEST,
        "version": VERSION,
        "kind": "LORA",
        "max_rank": 8,
        "size_bytes": 4096,
        "created": True,
        "aliases": {"live": DIGEST},
        "etag": "e1",
    }


@pytest.mark.parametrize(("flags", "alias"), [((), "live"), (("--alias", "canary"), "canary"), (("--no-alias",), "")])
def test_push_moves_live_unless_told_otherwise(
    fake: FakeChorus, run: Run, folder: Path, flags: tuple[str, ...], alias: str
) -> None:
    fake.answer(PUSH, PUSHED)
    assert run(*push(fake, folder, *flags)).exit_code == 0
    header = fake.calls[0].requests[0].header
    assert header.HasField("alias")
    assert (header.parent, header.alias) == (NAME, alias)


def test_alias_and_no_alias_exclude_each_other(fake: FakeChorus, run: Run, folder: Path) -> None:
    result = run(*push(fake, folder, "--alias", "canary", "--no-alias"))
    assert result.exit_code == 2
    assert not fake.calls


def test_push_without_a_folder_is_wrong_usage(fake: FakeChorus, run: Run, tmp_path: Path) -> None:
    assert run(*push(fake, tmp_path / "nowhere")).exit_code == 2


def test_push_of_a_pickle_is_refused_with_the_servers_reason(fake: FakeChorus, run: Run, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    result = run(*push(fake, folder, "--json"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("chorus: INVALID_ARGUMENT (PICKLE_REFUSED): adapter_model.bin")
    assert result.stderr.count("\n") == 1


def test_push_draws_no_bar_where_nobody_watches(fake: FakeChorus, run: Run, folder: Path) -> None:
    fake.answer(PUSH, PUSHED)
    result = run(*push(fake, folder))
    assert result.stderr == ""
    assert result.stdout.splitlines()[0] == VERSION


def test_list_prints_an_object_with_adapters(fake: FakeChorus, run_json: RunJson) -> None:
    fake.answer("Adapters.ListAdapters", adapters_pb2.ListAdaptersResponse(adapters=[ADAPTER]))
    assert run_json("adapters", "list", "--admin", fake.address, "--tenant", "acme") == {
        "adapters": [
            {
                "name": NAME,
                "aliases": {"live": DIGEST},
                "etag": "e1",
                "create_time": "1970-01-01T00:00:01+00:00",
                "update_time": "1970-01-01T00:00:02+00:00",
                "version_count": 3,
            }
        ]
    }
    assert fake.calls[0].request.parent == "tenants/acme"


def test_an_empty_list_is_an_empty_list(fake: FakeChorus, run_json: RunJson) -> None:
    fake.answer("Adapters.ListAdapters", adapters_pb2.ListAdaptersResponse())
    assert run_json("adapters", "list", "--admin", fake.address) == {"adapters": []}


def test_versions_prints_an_object_with_versions(fake: FakeChorus, run_json: RunJson) -> None:
    fake.answer("Adapters.ListVersions", adapters_pb2.ListVersionsResponse(versions=[STORED]))
    [version] = run_json("adapters", "versions", "acme/support", "--admin", fake.address)["versions"]
    assert (version["name"], version["kind"], version["pinned"]) == (VERSION, "LORA", True)
    assert fake.calls[0].request.parent == NAME


def test_alias_moves_it_and_sends_the_etag(fake: FakeChorus, run_json: RunJson) -> None:
    fake.answer("Adapters.SetAlias", ADAPTER)
    adapter = run_json("adapters", "alias", "acme/support", "live", DIGEST, "--etag", "e0", "--admin", fake.address)
    assert (adapter["name"], adapter["etag"]) == (NAME, "e1")
    request = fake.calls[0].request
    assert (request.name, request.alias, request.digest, request.etag) == (NAME, "live", DIGEST, "e0")


def test_an_empty_digest_removes_the_alias(fake: FakeChorus, run: Run) -> None:
    fake.answer("Adapters.SetAlias", ADAPTER)
    assert run("adapters", "alias", NAME, "canary", "", "--admin", fake.address).exit_code == 0
    assert fake.calls[0].request.digest == ""


@pytest.mark.parametrize(
    ("name", "method"), [(NAME, "DeleteAdapter"), (VERSION, "DeleteVersion"), ("acme/support", "DeleteAdapter")]
)
def test_delete_tells_an_adapter_from_a_version(fake: FakeChorus, run_json: RunJson, name: str, method: str) -> None:
    reply: Message = getattr(adapters_pb2, f"{method}Response")()
    fake.answer(f"Adapters.{method}", reply)
    full = VERSION if "Version" in method else NAME
    assert run_json("adapters", "delete", name, "--admin", fake.address) == {"deleted": full}
    assert fake.calls[0].request.name == full


@pytest.mark.parametrize(("command", "method"), [("pin", "PinVersion"), ("unpin", "UnpinVersion")])
def test_pin_and_unpin_print_the_version(fake: FakeChorus, run_json: RunJson, command: str, method: str) -> None:
    fake.answer(f"Adapters.{method}", STORED)
    assert run_json("adapters", command, VERSION, "--admin", fake.address)["digest"] == DIGEST
    assert fake.calls[0].request.name == VERSION


def test_residency_prints_versions_and_totals(fake: FakeChorus, run_json: RunJson) -> None:
    fake.answer("Adapters.GetResidency", RESIDENCY)
    residency = run_json("adapters", "residency", "--admin", fake.address)
    [version] = residency["versions"]
    assert (version["digest"], version["tier"], version["names"]) == (DIGEST, "device", [VERSION])
    assert residency["totals"] == {
        "rows_total": 1000,
        "rows_used": 56,
        "bytes_total": 1 << 20,
        "bytes_used": 2048,
        "kv_blocks_total": 64,
        "kv_blocks_used": 3,
    }


@pytest.mark.parametrize(
    ("args", "method", "reply", "shown"),
    [
        (("list",), "ListAdapters", adapters_pb2.ListAdaptersResponse(adapters=[ADAPTER]), "live -> abababababab"),
        (("list",), "ListAdapters", adapters_pb2.ListAdaptersResponse(), "no adapters"),
        (("versions", NAME), "ListVersions", adapters_pb2.ListVersionsResponse(versions=[STORED]), f"{DIGEST}  LORA"),
        (("pin", VERSION), "PinVersion", STORED, "LORA"),
        (("unpin", VERSION), "UnpinVersion", STORED, "LORA"),
        (("alias", NAME, "live", DIGEST), "SetAlias", ADAPTER, "live -> abababababab"),
        (("delete", "acme/support"), "DeleteAdapter", adapters_pb2.DeleteAdapterResponse(), f"deleted {NAME}"),
        (("residency",), "GetResidency", RESIDENCY, "56 of 1000 rank rows"),
        (("residency",), "GetResidency", RESIDENCY, f"  {NAME}\n"),
    ],
)
def test_people_get_it_in_words(
    fake: FakeChorus, run: Run, *, args: tuple[str, ...], method: str, reply: Message, shown: str
) -> None:
    fake.answer(f"Adapters.{method}", reply)
    result = run("adapters", *args, "--admin", fake.address)
    assert (result.exit_code, result.stderr) == (0, "")
    assert shown in result.stdout


def test_brackets_in_a_name_are_shown_and_not_obeyed(fake: FakeChorus, run: Run) -> None:
    odd = adapter_pb2.Adapter(name="[red]x[/red]")
    fake.answer("Adapters.ListAdapters", adapters_pb2.ListAdaptersResponse(adapters=[odd]))
    assert "[red]x[/red]" in run("adapters", "list", "--admin", fake.address).stdout


def test_a_stale_etag_is_one_line(fake: FakeChorus, run: Run) -> None:
    fake.answer("Adapters.SetAlias", error_status(grpc.StatusCode.ABORTED, "changed since", "STALE_ETAG"))
    result = run("adapters", "alias", NAME, "live", DIGEST, "--etag", "old", "--admin", fake.address)
    assert (result.exit_code, result.stderr) == (1, "chorus: ABORTED (STALE_ETAG): changed since\n")


def test_show_tells_aliases_config_metrics_and_place(fake: FakeChorus, run: Run) -> None:
    fake.answer("Adapters.GetAdapter", ADAPTER)
    stored = adapter_pb2.AdapterVersion()
    stored.CopyFrom(STORED)
    stored.site_count, stored.task, stored.metrics["validation_loss"] = 28, "generate", 0.25
    stored.alpha, stored.target_modules[:] = 16, ["down_proj", "q_proj"]
    older = adapter_pb2.AdapterVersion(name="n", digest="cd" * 32, kind="LORA", create_time=Timestamp(seconds=0))
    fake.answer("Adapters.ListVersions", adapters_pb2.ListVersionsResponse(versions=[older, stored]))
    fake.answer("Adapters.GetResidency", RESIDENCY)
    result = run("adapters", "show", "acme/support", "--admin", fake.address)
    assert result.exit_code == 0
    config = "LORA, rank 8, alpha 16, on 28 modules: down_proj, q_proj"
    for said in (NAME, f"{DIGEST}  (live)", config, "validation_loss 0.25", "not loaded"):
        assert said in result.stdout
    assert "device, 1 requests running" in result.stdout
    assert result.stdout.index(DIGEST) < result.stdout.index("cd" * 32)


def test_shown_json_joins_versions_with_their_place(fake: FakeChorus, run_json: RunJson) -> None:
    fake.answer("Adapters.GetAdapter", ADAPTER)
    fake.answer("Adapters.ListVersions", adapters_pb2.ListVersionsResponse(versions=[STORED]))
    fake.answer("Adapters.GetResidency", RESIDENCY)
    found = run_json("adapters", "show", "acme/support", "--admin", fake.address)
    [version] = found["versions"]
    assert (found["name"], version["aliases"], version["residency"]["tier"]) == (NAME, ["live"], "device")


def test_a_typo_in_a_name_is_pointed_out(fake: FakeChorus, run: Run) -> None:
    gone = error_status(grpc.StatusCode.NOT_FOUND, "no adapter", "ADAPTER_NOT_FOUND")
    fake.answer("Adapters.ListVersions", gone)
    fake.answer("Adapters.ListAdapters", adapters_pb2.ListAdaptersResponse(adapters=[ADAPTER]))
    result = run("adapters", "versions", "acme/suport", "--admin", fake.address)
    assert result.stderr == "chorus: NOT_FOUND (ADAPTER_NOT_FOUND): no adapter; did you mean acme/support?\n"


def both_versions(fake: FakeChorus) -> str:
    """The adapter has two versions that begin alike; gives the second's digest."""
    other = f"abcd{'0' * 60}"
    second = adapter_pb2.AdapterVersion(name=f"{NAME}/versions/{other}", digest=other)
    fake.answer("Adapters.ListVersions", adapters_pb2.ListVersionsResponse(versions=[STORED, second]))
    return other


@pytest.mark.parametrize(
    ("command", "method"),
    [
        (("alias", "acme/support", "live", "abcd"), "SetAlias"),
        (("pin", "acme/support/versions/abcd"), "PinVersion"),
        (("unpin", "acme/support/versions/abcd"), "UnpinVersion"),
        (("delete", "acme/support/versions/abcd"), "DeleteVersion"),
    ],
)
def test_how_a_digest_begins_is_enough(fake: FakeChorus, run: Run, command: tuple[str, ...], method: str) -> None:
    other = both_versions(fake)
    answers = {"SetAlias": ADAPTER, "DeleteVersion": adapters_pb2.DeleteVersionResponse()}
    fake.answer(f"Adapters.{method}", answers.get(method, STORED))
    result = run("adapters", *command, "--admin", fake.address)
    assert result.exit_code == 0, result.stderr
    request = fake.calls_of(f"Adapters.{method}")[0].request
    assert (request.digest if method == "SetAlias" else request.name.rpartition("/")[2]) == other


@pytest.mark.parametrize(
    ("begins", "says"), [("ffff", "ffff begins no digests of acme/support"), ("ab", "'ab' is not")]
)
def test_a_beginning_that_names_no_version_is_refused(fake: FakeChorus, run: Run, begins: str, says: str) -> None:
    both_versions(fake)
    fake.answer("Adapters.SetAlias", error_status(grpc.StatusCode.INVALID_ARGUMENT, "digest: 'ab' is not one", "X"))
    result = run("adapters", "alias", "acme/support", "live", begins, "--admin", fake.address)
    assert result.exit_code == 1
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_beginning_of_several_is_refused(fake: FakeChorus, run: Run) -> None:
    twins = [
        adapter_pb2.AdapterVersion(name=f"{NAME}/versions/{d}", digest=d) for d in ("abcd" * 16, "abcd" + "0" * 60)
    ]
    fake.answer("Adapters.ListVersions", adapters_pb2.ListVersionsResponse(versions=twins))
    result = run("adapters", "pin", "acme/support/versions/abcd", "--admin", fake.address)
    assert result.exit_code == 1
    assert "abcd begins 2 digests of acme/support; `chorus adapters versions acme/support`" in result.stderr


@pytest.mark.parametrize(
    ("name", "known", "says"),
    [
        ("acme/support@cnary", [ADAPTER], "acme/support has @live"),
        ("acme/zebra", [ADAPTER], "tenant acme has acme/support"),
        ("acme/zebra", [], "tenant acme has no adapters"),
        ("acme/support/versions/" + "0" * 64, [ADAPTER], "`chorus adapters versions acme/support` tells"),
    ],
)
def test_a_name_unlike_any_other_is_answered_with_what_there_is(
    fake: FakeChorus, run: Run, name: str, known: list[adapter_pb2.Adapter], says: str
) -> None:
    fake.answer("Inference.Generate", error_status(grpc.StatusCode.NOT_FOUND, "no adapter", "ADAPTER_NOT_FOUND"))
    fake.answer("Inference.ListAdapters", inference_pb2.ListAdaptersResponse(adapters=known))
    result = run("generate", "--server", fake.address, "--adapter", name, "--prompt", "hi")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert says in result.stderr
