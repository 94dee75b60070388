"""chorus.v1.Inference: what tenants call. Handlers only; checks, names, text and tokens have modules of their own."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import closing
from typing import NoReturn

from chorus import failpoints
from chorus.adapters.names import parse_adapter_name, parse_tenant_name
from chorus.errors import InvalidArgument, Unimplemented
from chorus.models.facts import BaseFacts
from chorus.services.catalog import Catalog
from chorus.services.completion import Completion
from chorus.services.front_end import EngineFrontEnd
from chorus.services.identity import Context, Tenant, tenant_of
from chorus.services.text import TextCodec
from chorus.services.validation import Wish, check_generate, fit
from chorus.v1 import adapter_pb2, generate_pb2, inference_pb2, inference_pb2_grpc, model_pb2, tasks_pb2

log = logging.getLogger(__name__)

VERSION_METADATA = "chorus-adapter-version"
BUILT_METHODS = ("Generate", "Tokenize", "Detokenize", "ListAdapters", "GetAdapter", "GetModel")


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """One base model, answering as the adapter that the caller names."""

    def __init__(
        self, front_end: EngineFrontEnd, catalog: Catalog, text: TextCodec, facts: BaseFacts, *, max_rank: int
    ) -> None:
        self._front_end = front_end
        self._catalog = catalog
        self._text = text
        self._facts = facts
        self._model = _model(facts, text, max_rank)

    async def Generate(
        self, request: generate_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        arrived_at = time.monotonic()
        await failpoints.hit_async("inference.generate")
        caller = tenant_of(context)
        wish = check_generate(request, self._facts)
        if wish.stop:
            self._text.require_tokenizer("sampling.stop")
        with self._catalog.lease(request.adapter, caller) as leased:
            prompt = await self._prompt(request)
            sampling = fit(wish.sampling, len(prompt), self._facts)
            await _tell_version(context, leased.version_name)
            with closing(
                self._front_end.submit(
                    prompt,
                    sampling,
                    adapter=leased.adapter,
                    tenant=leased.tenant,
                    priority=wish.priority,
                    deadline=_deadline(context),
                    arrived_at=arrived_at,
                )
            ) as stream:
                completion = Completion(
                    stream,
                    prompt,
                    text=self._text,
                    stop=wish.stop,
                    min_tokens=sampling.min_tokens,
                    version_name=leased.version_name,
                )
                async for message in completion.messages():
                    yield message
        _log_done(request, leased.tenant, wish, prompt, arrived_at)

    async def Tokenize(self, request: tasks_pb2.TokenizeRequest, context: Context) -> tasks_pb2.TokenizeResponse:
        with self._catalog.lease(request.adapter, tenant_of(context)):
            return tasks_pb2.TokenizeResponse(token_ids=await self._text.encode(request.text, "text"))

    async def Detokenize(self, request: tasks_pb2.DetokenizeRequest, context: Context) -> tasks_pb2.DetokenizeResponse:
        return tasks_pb2.DetokenizeResponse(text=self._text.decode(request.token_ids, "token_ids"))

    async def ListAdapters(
        self, request: inference_pb2.ListAdaptersRequest, context: Context
    ) -> inference_pb2.ListAdaptersResponse:
        tenant = _listed_tenant(request.parent, tenant_of(context))
        adapters, token = await self._catalog.adapters(tenant, request.page_size, request.page_token)
        return inference_pb2.ListAdaptersResponse(adapters=adapters, next_page_token=token)

    async def GetAdapter(self, request: inference_pb2.GetAdapterRequest, context: Context) -> adapter_pb2.Adapter:
        return self._catalog.adapter(parse_adapter_name(request.name))

    async def GetModel(self, request: inference_pb2.GetModelRequest, context: Context) -> model_pb2.Model:
        return self._model

    async def Classify(self, request: tasks_pb2.ClassifyRequest, context: Context) -> tasks_pb2.ClassifyResponse:
        _not_built("Classify", "sequence classification heads are not served yet")

    async def TagTokens(self, request: tasks_pb2.TagTokensRequest, context: Context) -> tasks_pb2.TagTokensResponse:
        _not_built("TagTokens", "token classification heads are not served yet")

    async def Answer(self, request: tasks_pb2.AnswerRequest, context: Context) -> tasks_pb2.AnswerResponse:
        _not_built("Answer", "question answering heads are not served yet")

    async def Embed(self, request: tasks_pb2.EmbedRequest, context: Context) -> tasks_pb2.EmbedResponse:
        _not_built("Embed", "pooled vectors are not served yet")

    async def Score(self, request: tasks_pb2.ScoreRequest, context: Context) -> tasks_pb2.ScoreResponse:
        _not_built("Score", "log-probabilities are not served yet")

    async def _prompt(self, request: generate_pb2.GenerateRequest) -> tuple[int, ...]:
        if request.WhichOneof("prompt") == "token_ids":
            return tuple(request.token_ids.ids)
        return await self._text.encode(request.text, "text")


def _listed_tenant(parent: str, caller: Tenant) -> str:
    if parent:
        return parse_tenant_name(parent)
    if caller.id is None:
        text = "name a tenant, tenants/T, here or in the metadata chorus-tenant"
        raise InvalidArgument(f"parent: {text}", field="parent")
    return caller.id


def _not_built(method: str, why: str) -> NoReturn:
    raise Unimplemented(f"{method} is in the contract but not built yet: {why}", reason="METHOD_NOT_BUILT")


async def _tell_version(context: Context, version_name: str) -> None:
    """Initial and trailing metadata name the version that answers; the base model itself has none."""
    if version_name:
        metadata = ((VERSION_METADATA, version_name),)
        context.set_trailing_metadata(metadata)
        await context.send_initial_metadata(metadata)


def _deadline(context: Context) -> float | None:
    """The call's deadline on `time.monotonic`'s clock; None where the client set none."""
    remaining: float | None = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _log_done(
    request: generate_pb2.GenerateRequest, tenant: str | None, wish: Wish, prompt: tuple[int, ...], arrived_at: float
) -> None:
    log.debug(
        "generate request_id=%s tenant=%s prompt_tokens=%d max_tokens=%d seconds=%.3f",
        request.request_id,
        tenant,
        len(prompt),
        wish.sampling.max_tokens,
        time.monotonic() - arrived_at,
    )


def _model(facts: BaseFacts, text: TextCodec, max_rank: int) -> model_pb2.Model:
    tokenizer = text.tokenizer
    return model_pb2.Model(
        name=facts.name,
        digest=facts.digest,
        model_type=facts.model_type,
        context_length=facts.context_length,
        vocab_size=facts.vocab_size,
        dtype=facts.dtype,
        parameter_count=facts.parameter_count,
        has_tokenizer=tokenizer is not None,
        max_rank=max_rank,
        sites=[
            model_pb2.ModelSite(name=site.name, in_features=site.in_features, out_features=site.out_features)
            for site in facts.sites
        ],
        eos_token_ids=sorted(facts.eos_token_ids),
        has_chat_template=bool(tokenizer is not None and tokenizer.chat_template),
        methods=BUILT_METHODS,
    )
