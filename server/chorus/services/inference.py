"""chorus.v1.Inference: what tenants call. Handlers only; checks, names, text and tokens have modules of their own."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from typing import NoReturn

from chorus import failpoints
from chorus.adapters.names import parse_adapter_name, parse_tenant_name
from chorus.engine.messages import Sampling
from chorus.errors import ChorusError, InvalidArgument, Unimplemented
from chorus.models.facts import BaseFacts
from chorus.services.catalog import Catalog, Leased
from chorus.services.chat import Chat
from chorus.services.completion import Completion
from chorus.services.front_end import EngineFrontEnd
from chorus.services.identity import Context, Tenant, tenant_of
from chorus.services.sampling import MAX_N
from chorus.services.scoring import score
from chorus.services.streams import TokenStream
from chorus.services.text import TextCodec
from chorus.services.validation import Wish, check_fits, check_generate, check_score, fit
from chorus.v1 import adapter_pb2, generate_pb2, inference_pb2, inference_pb2_grpc, model_pb2, tasks_pb2

log = logging.getLogger(__name__)

VERSION_METADATA = "chorus-adapter-version"
BUILT_METHODS = ("Generate", "Score", "Tokenize", "Detokenize", "ListAdapters", "GetAdapter", "GetModel")

EndCall = Callable[["asyncio.Task[object]", ChorusError], None]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """One base model, answering as the adapter that the caller names.

    `max_outputs` is how many outputs the engine's queue holds; `end_call` ends a call whatever it waits for.
    """

    def __init__(
        self,
        front_end: EngineFrontEnd,
        catalog: Catalog,
        text: TextCodec,
        chat: Chat,
        facts: BaseFacts,
        *,
        max_rank: int,
        max_outputs: int,
        end_call: EndCall,
    ) -> None:
        self._front_end = front_end
        self._catalog = catalog
        self._text = text
        self._chat = chat
        self._facts = facts
        self._max_n = min(MAX_N, max_outputs)
        self._end_call = end_call
        self._model = _model(facts, text, chat, max_rank)

    async def Generate(
        self, request: generate_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        arrived_at = time.monotonic()
        await failpoints.hit_async("inference.generate")
        caller = tenant_of(context)
        wish = check_generate(request, self._facts, self._max_n)
        if wish.stop:
            self._text.require_tokenizer("sampling.stop")
        with self._catalog.lease(request.adapter, caller) as leased:
            prompt = await self._prompt(request, leased)
            sampling = fit(wish.sampling, len(prompt), self._facts)
            with closing(
                self._front_end.submit(
                    prompt,
                    sampling,
                    n=wish.n,
                    adapter=leased.adapter,
                    tenant=leased.tenant,
                    priority=wish.priority,
                    deadline=_deadline(context),
                    arrived_at=arrived_at,
                )
            ) as stream:
                await _tell_version(context, leased.version_name)
                self._end_with(stream)
                completion = Completion(
                    stream,
                    prompt,
                    n=wish.n,
                    text=self._text,
                    stop=wish.stop,
                    min_tokens=sampling.min_tokens,
                    version_name=leased.version_name,
                )
                async for message in completion.messages():
                    yield message
        _log_done(request, leased.tenant, wish, prompt, arrived_at)

    async def Score(self, request: tasks_pb2.ScoreRequest, context: Context) -> tasks_pb2.ScoreResponse:
        arrived_at = time.monotonic()
        caller = tenant_of(context)
        check_score(request, self._facts)
        with self._catalog.lease(request.adapter, caller) as leased:
            prompt, continuations = await self._to_score(request)
            for i, continuation in enumerate(continuations):
                check_fits(len(prompt), len(continuation), i, self._facts)
            deadline = _deadline(context)

            def submit(tokens: tuple[int, ...], sampling: Sampling) -> TokenStream:
                return self._front_end.submit(
                    tokens,
                    sampling,
                    adapter=leased.adapter,
                    tenant=leased.tenant,
                    deadline=deadline,
                    arrived_at=arrived_at,
                )

            await _tell_version(context, leased.version_name)
            scores = await score(submit, prompt, continuations)
        return tasks_pb2.ScoreResponse(scores=scores, adapter_version=leased.version_name)

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

    async def _prompt(self, request: generate_pb2.GenerateRequest, leased: Leased) -> tuple[int, ...]:
        match request.WhichOneof("prompt"):
            case "token_ids":
                return tuple(request.token_ids.ids)
            case "messages":
                return await self._chat.prompt(request.messages.messages, leased)
            case _:
                return await self._text.encode(request.text, "text")

    async def _to_score(self, request: tasks_pb2.ScoreRequest) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Prompt and continuations in tokens."""
        if request.prompt_token_ids:
            return tuple(request.prompt_token_ids), [tuple(ids.ids) for ids in request.continuation_token_ids]
        prompt = await self._text.encode(request.prompt, "prompt")
        return prompt, [
            await self._text.encode(text, f"continuations[{i}]", special=False)
            for i, text in enumerate(request.continuations)
        ]

    def _end_with(self, stream: TokenStream) -> None:
        """An error of the stream ends this call even while it waits for its reader to take a message."""
        task = asyncio.current_task()
        if task is not None:
            stream.on_unheard = lambda error: self._end_call(task, error)


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
    """Initial and trailing metadata name the version that answers; the base model itself has none.

    Sent apart from the first message, always: while a message that nobody reads still carries them, grpc takes no
    status, and the call could not be ended.
    """
    metadata = ((VERSION_METADATA, version_name),) if version_name else ()
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


def _model(facts: BaseFacts, text: TextCodec, chat: Chat, max_rank: int) -> model_pb2.Model:
    return model_pb2.Model(
        name=facts.name,
        digest=facts.digest,
        model_type=facts.model_type,
        context_length=facts.context_length,
        vocab_size=facts.vocab_size,
        dtype=facts.dtype,
        parameter_count=facts.parameter_count,
        has_tokenizer=text.tokenizer is not None,
        max_rank=max_rank,
        sites=[
            model_pb2.ModelSite(name=site.name, in_features=site.in_features, out_features=site.out_features)
            for site in facts.sites
        ],
        eos_token_ids=sorted(facts.eos_token_ids),
        has_chat_template=chat.base_template is not None,
        methods=BUILT_METHODS,
    )
