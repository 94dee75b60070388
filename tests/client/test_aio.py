import inspect
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from chorus.admin.v1 import adapters_pb2
from chorus.client import AsyncClient, Client
from chorus.errors import DeadlineExceeded, InternalError, InvalidArgument, NotFound, Unavailable
from chorus.v1 import adapter_pb2, generate_pb2, model_pb2
from client.fake_chorus import FakeChorus, error_status

FIRST = generate_pb2.GenerateResponse(token_ids=[5, 6], text="Hel")
LAST = generate_pb2.GenerateResponse(token_ids=[7], text="lo", finish_reason=generate_pb2.FINISH_REASON_LENGTH)
SILENT_END = generate_pb2.GenerateResponse(token_ids=[9], finish_reason=generate_pb2.FINISH_REASON_STOP)


@pytest.fixture
async def aclient(fake: FakeChorus) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake.address, admin=fake.address, timeout=20) as opened:
        yield opened


def test_both_clients_have_the_same_surface() -> None:
    def surface(client: type) -> dict[str, list[tuple[str, object, object]]]:
        methods = inspect.getmembers(client, inspect.isfunction)
        return {
            name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
            for name, method in methods
            if not name.startswith("_") and name != "has_tokenizer"
        }

    assert surface(AsyncClient) == surface(Client)
    assert len(surface(Client)) > 15


async def test_deltas_come_in_order_and_the_result_is_all_of_them(fake: FakeChorus, aclient: AsyncClient) -> None:
    fake.answer("Inference.Generate", FIRST, LAST)
    async with aclient.stream("hi", adapter="acme/support") as answer:
        assert [delta.text async for delta in answer] == ["Hel", "lo"]
    assert (answer.result.token_ids, answer.result.text) == ((5, 6, 7), "Hello")
    assert fake.calls[0].request.adapter == "tenants/acme/adapters/support"


async def test_a_delta_is_there_before_the_next_is_sent(fake: FakeChorus, aclient: AsyncClient) -> None:
    seen = threading.Event()
    fake.answer("Inference.Generate", FIRST, lambda context: seen.wait(10), LAST)
    async with aclient.stream("hi") as answer:
        assert (await anext(answer)).text == "Hel"
        seen.set()
        assert (await anext(answer)).text == "lo"


async def test_leaving_the_context_cancels_on_the_server(fake: FakeChorus, aclient: AsyncClient) -> None:
    fake.answer("Inference.Generate", FIRST, fake.until_gone)
    async with aclient.stream("hi") as answer:
        await anext(answer)
    async with aclient.stream("hi"):
        pass
    assert fake.gone.wait(5)


async def test_cancel_ends_the_iteration_quietly(fake: FakeChorus, aclient: AsyncClient) -> None:
    fake.answer("Inference.Generate", FIRST, fake.until_gone)
    texts = []
    async with aclient.stream("hi") as answer:
        async for delta in answer:
            texts.append(delta.text)
            answer.cancel()
    assert texts == ["Hel"]


async def test_a_stream_without_a_finish_reason_is_an_error(fake: FakeChorus, aclient: AsyncClient) -> None:
    fake.answer("Inference.Generate", FIRST)
    with pytest.raises(InternalError, match="finish reason"):
        await aclient.generate("hi")


async def test_text_is_none_without_a_tokenizer(fake: FakeChorus, aclient: AsyncClient) -> None:
    fake.answer("Inference.GetModel", model_pb2.Model(has_tokenizer=False))
    for _ in range(2):
        fake.answer("Inference.Generate", SILENT_END)
        assert (await aclient.generate([1])).text is None
    assert len(fake.calls_of("Inference.GetModel")) == 1


async def test_errors_come_back_with_reason_and_fields(fake: FakeChorus, aclient: AsyncClient) -> None:
    status = error_status(grpc.StatusCode.INVALID_ARGUMENT, "no", "BAD_FIELD", fields={"sampling.n": "at most 16"})
    fake.answer("Inference.Generate", status)
    with pytest.raises(InvalidArgument) as caught:
        await aclient.generate("hi", request_id="job-7")
    assert (caught.value.reason, caught.value.request_id) == ("BAD_FIELD", "job-7")
    assert [violation.field for violation in caught.value.violations] == ["sampling.n"]


async def test_a_passed_deadline_says_how_long_it_was(fake: FakeChorus, aclient: AsyncClient) -> None:
    fake.answer("Inference.Generate", fake.until_gone)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        await aclient.generate("hi", timeout=0.2)


async def test_nobody_there_is_said() -> None:
    async with AsyncClient("127.0.0.1:1", timeout=20) as client:
        with pytest.raises(Unavailable, match="is the server running") as caught:
            await client.model()
    assert caught.value.reason == "UNREACHABLE"


async def test_listings_take_all_pages(fake: FakeChorus, aclient: AsyncClient) -> None:
    for name, token in (("a", "next"), ("b", "")):
        page = adapters_pb2.ListAdaptersResponse(adapters=[adapter_pb2.Adapter(name=name)], next_page_token=token)
        fake.answer("Adapters.ListAdapters", page)
    assert [adapter.name for adapter in await aclient.list_adapters()] == ["a", "b"]


async def test_a_push_sends_the_folder(fake: FakeChorus, aclient: AsyncClient, folder: Path) -> None:
    stored = adapters_pb2.CreateAdapterVersionResponse(created=True)
    fake.answer("Adapters.CreateAdapterVersion", stored)
    sent: list[tuple[int, int]] = []
    pushed = await aclient.push(folder, tenant="acme", name="support", on_progress=lambda *so_far: sent.append(so_far))
    header, *chunks = fake.calls[0].requests
    assert pushed.created
    assert [file.name for file in header.header.files] == ["adapter_config.json", "adapter_model.safetensors"]
    total = sum(len(chunk.chunk.data) for chunk in chunks)
    assert sent[-1] == (total, total)


async def test_a_file_that_shrinks_is_what_went_wrong(fake: FakeChorus, aclient: AsyncClient, folder: Path) -> None:
    def shrink(done: int, total: int) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"")

    fake.answer("Adapters.CreateAdapterVersion", adapters_pb2.CreateAdapterVersionResponse())
    with pytest.raises(InvalidArgument) as caught:
        await aclient.push(folder, tenant="acme", name="support", on_progress=shrink)
    assert caught.value.reason == "FILE_CHANGED"


async def test_a_refused_push_is_the_servers_word(fake: FakeChorus, aclient: AsyncClient, folder: Path) -> None:
    fake.answer("Adapters.CreateAdapterVersion", error_status(grpc.StatusCode.NOT_FOUND, "no tenant", "NO_TENANT"))
    with pytest.raises(NotFound, match="no tenant"):
        await aclient.push(folder, tenant="acme", name="support")


async def test_a_client_that_made_no_call_closes() -> None:
    async with AsyncClient("127.0.0.1:1"):
        pass
