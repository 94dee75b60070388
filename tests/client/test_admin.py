from datetime import UTC, datetime

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from chorus.admin.v1 import adapters_pb2
from chorus.client import Client, ResidencyTotals
from chorus.errors import Aborted
from chorus.v1 import adapter_pb2
from client.fake_chorus import FakeChorus, error_status

DIGEST = "ab" * 32
NAME = "tenants/acme/adapters/support"
VERSION = f"{NAME}/versions/{DIGEST}"


@pytest.mark.parametrize(("tenant", "parent"), [(None, ""), ("acme", "tenants/acme"), ("tenants/acme", "tenants/acme")])
def test_adapters_are_listed_over_all_pages(fake: FakeChorus, client: Client, tenant: str | None, parent: str) -> None:
    for name, token in (("a", "next"), ("b", "")):
        page = adapters_pb2.ListAdaptersResponse(adapters=[adapter_pb2.Adapter(name=name)], next_page_token=token)
        fake.answer("Adapters.ListAdapters", page)
    assert [adapter.name for adapter in client.list_adapters(tenant)] == ["a", "b"]
    assert [(call.request.parent, call.request.page_token) for call in fake.calls] == [(parent, ""), (parent, "next")]


def test_versions_are_listed_with_their_facts(fake: FakeChorus, client: Client) -> None:
    stored = adapter_pb2.AdapterVersion(
        name=VERSION,
        digest=DIGEST,
        kind="LORA",
        create_time=Timestamp(seconds=1),
        pinned=True,
        metrics={"validation_loss": 0.5},
    )
    fake.answer("Adapters.ListVersions", adapters_pb2.ListVersionsResponse(versions=[stored]))
    [version] = client.versions("acme/support")
    assert fake.calls[0].request.parent == NAME
    assert (version.digest, version.kind, version.pinned) == (DIGEST, "LORA", True)
    assert version.create_time == datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    assert version.metrics == {"validation_loss": 0.5}


@pytest.mark.parametrize(("given", "sent"), [(DIGEST, DIGEST), (VERSION, DIGEST), ("", "")])
def test_an_alias_takes_a_digest_or_a_versions_name(fake: FakeChorus, client: Client, given: str, sent: str) -> None:
    fake.answer("Adapters.SetAlias", adapter_pb2.Adapter(name=NAME, aliases={"live": DIGEST}, etag="e2"))
    adapter = client.set_alias("acme/support", "live", given, etag="e1")
    request = fake.calls[0].request
    assert (request.name, request.alias, request.digest, request.etag) == (NAME, "live", sent, "e1")
    assert adapter.etag == "e2"


def test_a_stale_etag_is_aborted(fake: FakeChorus, client: Client) -> None:
    fake.answer("Adapters.SetAlias", error_status(grpc.StatusCode.ABORTED, "the adapter has changed", "STALE_ETAG"))
    with pytest.raises(Aborted):
        client.set_alias("acme/support", "live", DIGEST, etag="old")


def test_delete_tells_an_adapter_from_a_version(fake: FakeChorus, client: Client) -> None:
    fake.answer("Adapters.DeleteAdapter", adapters_pb2.DeleteAdapterResponse())
    fake.answer("Adapters.DeleteVersion", adapters_pb2.DeleteVersionResponse())
    client.delete("acme/support")
    client.delete(f"acme/support/versions/{DIGEST}")
    assert [(call.method, call.request.name) for call in fake.calls] == [
        ("Adapters.DeleteAdapter", NAME),
        ("Adapters.DeleteVersion", VERSION),
    ]


def test_pin_unpin_and_prefetch_name_the_version(fake: FakeChorus, client: Client) -> None:
    fake.answer("Adapters.PinVersion", adapter_pb2.AdapterVersion(name=VERSION, pinned=True))
    fake.answer("Adapters.UnpinVersion", adapter_pb2.AdapterVersion(name=VERSION))
    fake.answer("Adapters.PrefetchVersion", adapters_pb2.PrefetchVersionResponse())
    assert client.pin(VERSION).pinned
    assert not client.unpin(VERSION).pinned
    client.prefetch(f"acme/support/versions/{DIGEST}")
    assert [call.request.name for call in fake.calls] == [VERSION] * 3


def test_residency_tells_tiers_and_totals(fake: FakeChorus, client: Client) -> None:
    fake.answer(
        "Adapters.GetResidency",
        adapters_pb2.GetResidencyResponse(
            versions=[
                adapters_pb2.ResidentVersion(digest="a", tier=adapters_pb2.TIER_DEVICE, refs=2, names=[VERSION]),
                adapters_pb2.ResidentVersion(digest="b", tier=adapters_pb2.TIER_LOADING),
            ],
            rows_total=100,
            rows_used=8,
            bytes_total=1000,
            bytes_used=80,
            kv_blocks_total=64,
            kv_blocks_used=3,
        ),
    )
    residency = client.residency()
    assert [(version.digest, version.tier) for version in residency.versions] == [("a", "device"), ("b", "loading")]
    assert (residency.versions[0].refs, residency.versions[0].names) == (2, (VERSION,))
    assert residency.totals == ResidencyTotals(100, 8, 1000, 80, 64, 3)
