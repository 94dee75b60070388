"""Publishing and operating: what is stored, what is refused, and that nothing is left of what fails."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chorus.admin.v1 import adapters_pb2
from chorus.engine.messages import LoadFailed, Pin, ResidentAdapter, Submit, Unload, Unpin
from chorus.services import admin
from chorus.v1 import generate_pb2
from services.fakes import FACTS, lora_files, never_ends, upload
from services.harness import MakeRig, Rig, refused, until

X = "tenants/a/adapters/x"


async def test_published_version_is_live_stored_and_described(rig: Rig) -> None:
    answer = await rig.publish(X)
    version = answer.version
    assert answer.created
    assert version.name == f"{X}/versions/{version.digest}"
    assert (version.kind, version.max_rank, version.site_count, version.pinned) == ("LORA", 4, 1, False)
    assert version.size_bytes == 2 * 4 * 16 * 4
    assert (version.alpha, [*version.target_modules]) == (8.0, ["q_proj"])
    assert answer.adapter.aliases == {"live": version.digest}
    folder = rig.config.state_dir / "blobs" / "sha256" / version.digest[:2] / version.digest
    assert {file.name for file in folder.iterdir()} == set(lora_files())
    assert leftovers(rig) == []


async def test_same_content_is_stored_once(rig: Rig) -> None:
    first, second = await rig.publish(X), await rig.publish(X)
    assert (first.created, second.created) == (True, False)
    assert first.version.digest == second.version.digest
    assert second.adapter.version_count == 1


async def test_same_request_id_gets_the_first_answer_again(rig: Rig) -> None:
    first = await rig.publish(X, request_id="r1")
    other = await rig.publish(X, seed=1)
    again = await rig.publish(X, request_id="r1")
    assert again.created
    assert again.version.digest == first.version.digest
    assert again.adapter.aliases["live"] == other.version.digest
    assert (await refused(rig.publish(X, seed=2, request_id="r1"))).reason == "REQUEST_ID_REUSED"


@pytest.mark.parametrize(("alias", "aliases"), [(None, {"live"}), ("", set()), ("canary", {"canary"})])
async def test_alias_of_an_upload(rig: Rig, alias: str | None, aliases: set[str]) -> None:
    assert set((await rig.publish(X, alias=alias)).adapter.aliases) == aliases


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
async def test_chunks_may_cut_files_anywhere(rig: Rig, chunk: int) -> None:
    assert (await rig.publish(X, chunk=chunk)).created


def bad_files() -> list[Any]:
    good = lora_files()
    weights = good["adapter_model.safetensors"]
    return [
        pytest.param({**good, "adapter_model.bin": b"x"}, "INVALID_ARGUMENT", "PICKLE_REFUSED", id="pickle"),
        pytest.param({**good, "../evil": b"x"}, "INVALID_ARGUMENT", "UNKNOWN_FILE", id="path"),
        pytest.param({**good, "run.py": b"x"}, "INVALID_ARGUMENT", "UNKNOWN_FILE", id="unknown-name"),
        pytest.param({"adapter_config.json": good["adapter_config.json"]}, "INVALID_ARGUMENT", None, id="no-weights"),
        pytest.param({**good, "adapter_model.safetensors": weights[:-8]}, "INVALID_ARGUMENT", None, id="truncated"),
        pytest.param({**good, "adapter_config.json": b"{"}, "INVALID_ARGUMENT", None, id="bad-json"),
        pytest.param({}, "INVALID_ARGUMENT", None, id="nothing"),
        pytest.param(lora_files(rank=256), "FAILED_PRECONDITION", "RANK_OVER_LIMIT", id="rank"),
        pytest.param(lora_files(module="other.q_proj"), "FAILED_PRECONDITION", None, id="other-base"),
        pytest.param({**good, "task.json": b"x" * (1 << 20)}, "INVALID_ARGUMENT", "ADAPTER_TOO_LARGE", id="too-large"),
    ]


@pytest.mark.parametrize(("files", "code", "reason"), bad_files())
async def test_bad_uploads_are_refused_and_leave_nothing(
    rig: Rig, files: dict[str, bytes], code: str, reason: str | None
) -> None:
    seen = await refused(rig.admin.CreateAdapterVersion(upload(X, files)))
    assert seen.code == code
    assert reason in (None, seen.reason)
    assert str(rig.config.state_dir) not in seen.message
    assert nothing_stored(rig)


@pytest.mark.parametrize("size", [-1, 0, 10, 1_000_000, 2**62])
async def test_header_must_tell_the_sizes_that_come(rig: Rig, size: int) -> None:
    messages = upload(X, lora_files(), sizes={"adapter_model.safetensors": size})
    assert (await refused(rig.admin.CreateAdapterVersion(messages))).code == "INVALID_ARGUMENT"
    assert nothing_stored(rig)


async def test_upload_without_header_or_with_two_is_refused(rig: Rig) -> None:
    header, *chunks = upload(X, lora_files())
    for messages in ([], chunks, [header, header, *chunks]):
        assert (await refused(rig.admin.CreateAdapterVersion(iter(messages)))).code == "INVALID_ARGUMENT"
    assert nothing_stored(rig)


async def test_client_that_vanishes_while_it_uploads_leaves_nothing(rig: Rig) -> None:
    call = rig.admin.CreateAdapterVersion()
    for message in list(upload(X, lora_files(), chunk=100))[:4]:
        await call.write(message)
    await until(lambda: leftovers(rig) != [])
    call.cancel()
    await until(lambda: leftovers(rig) == [])
    assert nothing_stored(rig)


async def test_alias_moves_atomically_and_only_with_a_fresh_etag(rig: Rig) -> None:
    first = await rig.publish(X)
    second = await rig.publish(X, seed=1, alias="")
    request = adapters_pb2.SetAliasRequest(name=X, alias="live", digest=second.version.digest, etag=second.adapter.etag)
    moved = await rig.admin.SetAlias(request)
    assert moved.aliases == {"live": second.version.digest}
    seen = await refused(rig.admin.SetAlias(request_with(request, digest=first.version.digest)))
    assert seen.code == "ABORTED"
    removed = await rig.admin.SetAlias(adapters_pb2.SetAliasRequest(name=X, alias="live"))
    assert removed.aliases == {}


async def test_listings_come_in_pages(rig: Rig) -> None:
    for name in ("tenants/a/adapters/x", "tenants/a/adapters/y", "tenants/b/adapters/x"):
        await rig.publish(name)
    seen, token = [], ""
    while True:
        page = await rig.admin.ListAdapters(adapters_pb2.ListAdaptersRequest(page_size=2, page_token=token))
        seen += [adapter.name for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    assert seen == ["tenants/a/adapters/x", "tenants/a/adapters/y", "tenants/b/adapters/x"]
    only_b = await rig.admin.ListAdapters(adapters_pb2.ListAdaptersRequest(parent="tenants/b"))
    assert [adapter.name for adapter in only_b.adapters] == ["tenants/b/adapters/x"]
    versions = await rig.admin.ListVersions(adapters_pb2.ListVersionsRequest(parent=X))
    assert len(versions.versions) == 1


async def test_version_under_an_alias_is_kept_and_others_go(rig: Rig) -> None:
    live = (await rig.publish(X)).version
    other = (await rig.publish(X, seed=1, alias="")).version
    seen = await refused(rig.admin.DeleteVersion(adapters_pb2.DeleteVersionRequest(name=live.name)))
    assert seen.code == "FAILED_PRECONDITION"
    await rig.admin.DeleteVersion(adapters_pb2.DeleteVersionRequest(name=other.name))
    await until(lambda: Unload(other.digest) in rig.engine.commands)
    assert not blob(rig, other.digest).exists()
    assert blob(rig, live.digest).exists()


async def test_files_of_a_deleted_adapter_stay_while_a_stream_runs_on_it(rig: Rig) -> None:
    version = (await rig.publish(X)).version
    rig.engine.reply = never_ends
    call = rig.inference.Generate(generate_pb2.GenerateRequest(text="x", adapter=X))
    reader = aiter(call)
    await anext(reader)
    await rig.admin.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=X))
    assert (await refused(rig.generate(adapter=X))).code == "NOT_FOUND"
    assert (await anext(reader)).text
    assert blob(rig, version.digest).exists()
    call.cancel()
    await until(lambda: not blob(rig, version.digest).exists())
    await until(lambda: Unload(version.digest) in rig.engine.commands)


async def test_stream_runs_on_the_version_that_the_alias_meant_at_its_start(rig: Rig) -> None:
    first = (await rig.publish(X)).version
    await rig.generate(adapter=X)
    second = (await rig.publish(X, seed=1)).version
    await rig.generate(adapter=X)
    digests = [c.adapter.digest for c in rig.engine.sent(Submit) if isinstance(c, Submit) and c.adapter]
    assert digests == [first.digest, second.digest]


async def test_pinned_version_is_pinned_again_after_a_restart(rig: Rig, make_rig: MakeRig) -> None:
    version = (await rig.publish(X)).version
    assert (await rig.admin.PinVersion(adapters_pb2.PinVersionRequest(name=version.name))).pinned
    await rig.server.close()
    after = await make_rig()
    await until(lambda: bool(after.engine.sent(Pin)))
    unpinned = await after.admin.UnpinVersion(adapters_pb2.UnpinVersionRequest(name=version.name))
    assert not unpinned.pinned
    assert Unpin(version.digest) in after.engine.commands


async def test_version_of_another_base_is_refused_with_both_names(
    rig: Rig, make_rig: MakeRig, caplog: pytest.LogCaptureFixture
) -> None:
    version = (await rig.publish(X)).version
    await rig.admin.PinVersion(adapters_pb2.PinVersionRequest(name=version.name))
    await rig.server.close()
    after = await make_rig(facts=replace(FACTS, digest="1" * 64))
    for call in (
        after.generate(adapter=X),
        after.admin.PrefetchVersion(adapters_pb2.PrefetchVersionRequest(name=version.name)),
    ):
        seen = await refused(call)
        assert (seen.code, seen.reason) == ("FAILED_PRECONDITION", "BASE_MISMATCH")
        assert "0" * 12 in seen.message
        assert "1" * 12 in seen.message
    assert not after.engine.commands
    assert f"version {version.digest} is not pinned again" in caplog.text
    await after.admin.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=X))


async def test_pin_that_fails_is_not_remembered(rig: Rig) -> None:
    version = (await rig.publish(X)).version
    rig.engine.load_error = LoadFailed(version.digest, "DATA_LOSS", "DIGEST_MISMATCH", "bytes changed")
    seen = await refused(rig.admin.PinVersion(adapters_pb2.PinVersionRequest(name=version.name)))
    assert (seen.code, seen.reason) == ("DATA_LOSS", "DIGEST_MISMATCH")
    assert Unpin(version.digest) in rig.engine.commands
    listed = await rig.admin.ListVersions(adapters_pb2.ListVersionsRequest(parent=X))
    assert not listed.versions[0].pinned


async def test_content_pinned_under_another_name_stays_pinned(rig: Rig) -> None:
    one, two = (await rig.publish(X)).version, (await rig.publish("tenants/b/adapters/y")).version
    for version in (one, two):
        await rig.admin.PinVersion(adapters_pb2.PinVersionRequest(name=version.name))
    await rig.admin.UnpinVersion(adapters_pb2.UnpinVersionRequest(name=one.name))
    assert not rig.engine.sent(Unpin)
    await rig.admin.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="tenants/b/adapters/y"))
    assert rig.engine.sent(Unpin) == [Unpin(two.digest)]


async def test_prefetch_without_room_ends_with_a_time_to_come_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "LOAD_TIMEOUT_S", 0.1)
    rig.engine.loads_answered = False
    version = (await rig.publish(X)).version
    seen = await refused(rig.admin.PrefetchVersion(adapters_pb2.PrefetchVersionRequest(name=version.name)))
    assert (seen.code, seen.reason) == ("RESOURCE_EXHAUSTED", "NO_ADAPTER_ROOM")
    assert seen.retry_after_s is not None
    monkeypatch.undo()
    rig.engine.loads_answered = True
    await rig.admin.PrefetchVersion(adapters_pb2.PrefetchVersionRequest(name=version.name))


async def test_residency_joins_the_names_that_share_a_content(rig: Rig) -> None:
    one, two = (await rig.publish(X)).version, (await rig.publish("tenants/b/adapters/y")).version
    rig.engine.resident = (ResidentAdapter(one.digest, "device", 512, 8, 4, 2, True, 7),)
    report = await rig.admin.GetResidency(adapters_pb2.GetResidencyRequest())
    [version] = report.versions
    assert list(version.names) == [one.name, two.name]
    assert (version.tier, version.refs, version.hits, version.pinned) == (adapters_pb2.TIER_DEVICE, 2, 7, True)
    assert (report.rows_total, report.rows_used, report.kv_blocks_total, report.kv_blocks_used) == (64, 16, 32, 3)


async def test_public_listing_shows_the_callers_tenant(rig: Rig) -> None:
    from chorus.v1 import inference_pb2

    await rig.publish(X)
    await rig.publish("tenants/b/adapters/y")
    request = inference_pb2.ListAdaptersRequest()
    page = await rig.inference.ListAdapters(request, metadata=(("chorus-tenant", "b"),))
    assert [adapter.name for adapter in page.adapters] == ["tenants/b/adapters/y"]
    assert list((await refused(rig.inference.ListAdapters(request))).fields) == ["parent"]
    bad = rig.inference.ListAdapters(request, metadata=(("chorus-tenant", "../b"),))
    assert (await refused(bad)).code == "INVALID_ARGUMENT"
    adapter = await rig.inference.GetAdapter(inference_pb2.GetAdapterRequest(name=X))
    assert adapter.name == X


async def test_many_uploads_of_one_content_at_once_make_one_version(rig: Rig) -> None:
    answers = await asyncio.gather(*(rig.publish(X) for _ in range(20)))
    assert sum(answer.created for answer in answers) == 1
    assert {answer.adapter.version_count for answer in answers} == {1}
    assert leftovers(rig) == []


def request_with(request: adapters_pb2.SetAliasRequest, **changes: str) -> adapters_pb2.SetAliasRequest:
    changed = adapters_pb2.SetAliasRequest()
    changed.CopyFrom(request)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def blob(rig: Rig, digest: str) -> Path:
    return rig.config.state_dir / "blobs" / "sha256" / digest[:2] / digest


def leftovers(rig: Rig) -> list[Path]:
    return list((rig.config.state_dir / "blobs" / "tmp").iterdir())


def nothing_stored(rig: Rig) -> bool:
    return not leftovers(rig) and not list((rig.config.state_dir / "blobs" / "sha256").glob("*/*"))
