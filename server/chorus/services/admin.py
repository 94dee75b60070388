"""chorus.admin.v1.Adapters: what operators call. Handlers only; uploads and the catalog do the work."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NoReturn

from chorus import failpoints, logs
from chorus.adapters.names import (
    LIVE,
    AdapterName,
    check_digest,
    check_id,
    parse_adapter_name,
    parse_tenant_name,
    parse_version_name,
)
from chorus.admin.v1 import adapters_pb2, adapters_pb2_grpc
from chorus.engine.messages import AdapterRef, Loaded
from chorus.errors import ChorusError, InvalidArgument, ResourceExhausted, Unimplemented
from chorus.services.catalog import Catalog
from chorus.services.findings import Findings
from chorus.services.front_end import EngineFrontEnd
from chorus.services.identity import Context
from chorus.services.resources import adapter_message
from chorus.services.uploads import Uploads, next_request
from chorus.v1 import adapter_pb2

log = logging.getLogger(__name__)

# How long PinVersion and PrefetchVersion wait for room on the device, seconds.
LOAD_TIMEOUT_S = 60.0
MAX_GRACE_S = 86_400.0
TIERS = {
    "device": adapters_pb2.TIER_DEVICE,
    "host": adapters_pb2.TIER_HOST,
    "loading": adapters_pb2.TIER_LOADING,
}

BeginDrain = Callable[[float | None], Awaitable[None]]


class AdaptersServicer(adapters_pb2_grpc.AdaptersServicer):
    """Publishing, aliases, residency and drain. `on_tenant_gone` hears of tenants that have no adapter left."""

    def __init__(
        self,
        front_end: EngineFrontEnd,
        catalog: Catalog,
        uploads: Uploads,
        *,
        begin_drain: BeginDrain,
        on_tenant_gone: Callable[[str], None],
    ) -> None:
        self._front_end = front_end
        self._catalog = catalog
        self._uploads = uploads
        self._begin_drain = begin_drain
        self._on_tenant_gone = on_tenant_gone

    async def CreateAdapterVersion(
        self, request_iterator: AsyncIterator[adapters_pb2.CreateAdapterVersionRequest], context: Context
    ) -> adapters_pb2.CreateAdapterVersionResponse:
        first = await next_request(request_iterator)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgument("the first message must have the header", field="header")
        header = first.header
        name, alias = self._check_header(header)
        if header.request_id:
            logs.note(request_id=header.request_id)
        async with self._uploads.folder() as folder:
            await self._uploads.receive(request_iterator, header.files, folder)
            await failpoints.hit_async("upload.received")
            upload = await self._front_end.check(folder)
            files = [folder / file.name for file in header.files]
            record, created = await self._catalog.publish(
                name, upload, files, alias=alias, request_id=header.request_id
            )
        log.info("%s: version %s, alias %r, created=%s", name, upload.digest, alias, created)
        return adapters_pb2.CreateAdapterVersionResponse(
            version=self._catalog.version(name.version(upload.digest)),
            adapter=adapter_message(record),
            created=created,
        )

    async def GetAdapter(self, request: adapters_pb2.GetAdapterRequest, context: Context) -> adapter_pb2.Adapter:
        return self._catalog.adapter(parse_adapter_name(request.name))

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        tenant = None if request.parent in ("", "tenants/-") else parse_tenant_name(request.parent)
        adapters, token = await self._catalog.adapters(tenant, request.page_size, request.page_token)
        return adapters_pb2.ListAdaptersResponse(adapters=adapters, next_page_token=token)

    async def ListVersions(
        self, request: adapters_pb2.ListVersionsRequest, context: Context
    ) -> adapters_pb2.ListVersionsResponse:
        name = parse_adapter_name(request.parent, "parent")
        versions, token = await self._catalog.versions(name, request.page_size, request.page_token)
        return adapters_pb2.ListVersionsResponse(versions=versions, next_page_token=token)

    async def SetAlias(self, request: adapters_pb2.SetAliasRequest, context: Context) -> adapter_pb2.Adapter:
        name = parse_adapter_name(request.name)
        check_id(request.alias, "alias")
        if request.digest:
            check_digest(request.digest)
        adapter = await self._catalog.set_alias(name, request.alias, request.digest, request.etag)
        log.info("%s: alias %s -> %s", name, request.alias, request.digest or "none")
        return adapter

    async def DeleteVersion(
        self, request: adapters_pb2.DeleteVersionRequest, context: Context
    ) -> adapters_pb2.DeleteVersionResponse:
        name = parse_version_name(request.name)
        await self._catalog.delete_version(name)
        self._unpin_unless_wanted([str(name.digest)])
        log.info("%s deleted", name)
        return adapters_pb2.DeleteVersionResponse()

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Context
    ) -> adapters_pb2.DeleteAdapterResponse:
        name = parse_adapter_name(request.name)
        self._unpin_unless_wanted(await self._catalog.delete_adapter(name))
        if not (await self._catalog.adapters(name.tenant, 1, ""))[0]:
            self._on_tenant_gone(name.tenant)
        log.info("%s deleted", name)
        return adapters_pb2.DeleteAdapterResponse()

    async def PinVersion(self, request: adapters_pb2.PinVersionRequest, context: Context) -> adapter_pb2.AdapterVersion:
        name = parse_version_name(request.name)
        with self._catalog.hold(name) as adapter:
            try:
                await _when_loaded(self._front_end.pin(adapter))
                return await self._catalog.set_pinned(name, True)
            except BaseException:
                self._unpin_unless_wanted([adapter.digest])
                raise

    async def UnpinVersion(
        self, request: adapters_pb2.UnpinVersionRequest, context: Context
    ) -> adapter_pb2.AdapterVersion:
        name = parse_version_name(request.name)
        version = await self._catalog.set_pinned(name, False)
        self._unpin_unless_wanted([str(name.digest)])
        return version

    async def PrefetchVersion(
        self, request: adapters_pb2.PrefetchVersionRequest, context: Context
    ) -> adapters_pb2.PrefetchVersionResponse:
        with self._catalog.hold(parse_version_name(request.name)) as adapter:
            await _when_loaded(self._front_end.load(adapter))
        return adapters_pb2.PrefetchVersionResponse()

    async def GetResidency(
        self, request: adapters_pb2.GetResidencyRequest, context: Context
    ) -> adapters_pb2.GetResidencyResponse:
        report = await self._front_end.residency()
        versions = [
            adapters_pb2.ResidentVersion(
                digest=adapter.digest,
                tier=TIERS[adapter.tier],
                bytes=adapter.bytes,
                rank_rows=adapter.rank_rows,
                max_rank=adapter.max_rank,
                refs=adapter.refs,
                pinned=adapter.pinned,
                hits=adapter.hits,
                names=self._catalog.names(adapter.digest),
            )
            for adapter in report.adapters
        ]
        return adapters_pb2.GetResidencyResponse(
            versions=versions,
            rows_total=report.rows_total,
            rows_used=report.rows_used,
            bytes_total=report.bytes_total,
            bytes_used=report.bytes_used,
            kv_blocks_total=report.kv_blocks_total,
            kv_blocks_used=report.kv_blocks_used,
        )

    async def Drain(self, request: adapters_pb2.DrainRequest, context: Context) -> adapters_pb2.DrainResponse:
        """Answers as soon as the drain has begun."""
        grace_s = request.grace.ToNanoseconds() / 1e9 if request.HasField("grace") else None
        if grace_s is not None and not 0 <= grace_s <= MAX_GRACE_S:
            raise InvalidArgument(f"grace: must be between 0 and {MAX_GRACE_S:g} seconds", field="grace")
        log.info("asked to drain")
        await self._begin_drain(grace_s)
        return adapters_pb2.DrainResponse()

    async def CreateTenant(self, request: adapters_pb2.CreateTenantRequest, context: Context) -> adapters_pb2.Tenant:
        _not_built("CreateTenant")

    async def CreateApiKey(
        self, request: adapters_pb2.CreateApiKeyRequest, context: Context
    ) -> adapters_pb2.CreateApiKeyResponse:
        _not_built("CreateApiKey")

    async def RevokeApiKey(
        self, request: adapters_pb2.RevokeApiKeyRequest, context: Context
    ) -> adapters_pb2.RevokeApiKeyResponse:
        _not_built("RevokeApiKey")

    async def SetQuota(self, request: adapters_pb2.SetQuotaRequest, context: Context) -> adapters_pb2.SetQuotaResponse:
        _not_built("SetQuota")

    def _check_header(self, header: adapters_pb2.UploadHeader) -> tuple[AdapterName, str]:
        """The adapter's name and the alias to move, "" for none."""
        name = parse_adapter_name(header.parent, "header.parent")
        alias = header.alias if header.HasField("alias") else LIVE
        if alias:
            check_id(alias, "header.alias")
        findings = Findings()
        findings.request_id(header.request_id, "header.request_id")
        findings.raise_any()
        self._uploads.check_header(header)
        return name, alias

    def _unpin_unless_wanted(self, digests: list[str]) -> None:
        """Content may be pinned under another name too."""
        for digest in digests:
            if not self._catalog.is_pinned(digest):
                self._front_end.unpin(digest)


async def pin_again(catalog: Catalog, front_end: EngineFrontEnd) -> None:
    """At start: brings back what was pinned. What can not be pinned is logged, and loads when it is called."""

    async def pin(adapter: AdapterRef) -> None:
        try:
            await front_end.pin(adapter)
        except ChorusError as error:
            log.error("version %s could not be pinned again: %s", adapter.digest, error.message)

    await asyncio.gather(*(pin(adapter) for adapter in catalog.pinned()))


async def _when_loaded(loading: Awaitable[Loaded]) -> None:
    try:
        async with asyncio.timeout(LOAD_TIMEOUT_S):
            await loading
    except TimeoutError:
        text = f"the device had no room for the version for {LOAD_TIMEOUT_S:g} seconds; unpin something or try again"
        raise ResourceExhausted(text, reason="NO_ADAPTER_ROOM", retry_after_s=10.0) from None


def _not_built(method: str) -> NoReturn:
    text = f"{method} is in the contract but not built yet: this server is open and knows no keys or quotas"
    raise Unimplemented(text, reason="METHOD_NOT_BUILT")
