import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from node.generation.engine import GenerationEngine
from node.worker.chat_service import ChatService
from tests.support.deadlines import scaled
from tests.support.engines import DEADLINE, Fragile, Script, Tiny, listen, live_caches, until
from tests.support.tiny import tiny_config, write_model
from unicluster.cluster.channels import as_error, bind, connect, make_server
from unicluster.errors import StageError, UnavailableError, UniclusterError
from unicluster.trust.cluster import Cluster
from unicluster.v1.chat_pb2 import DescribeChatRequest, GenerateRequest
from unicluster.v1.chat_pb2_grpc import ChatStub, add_ChatServicer_to_server

PROMPT = [1, 2, 3]
ENDLESS = Script([65] * 100_000)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tiny_config("llama"))


@pytest.fixture
async def tiny(path: Path) -> Tiny:
    return await Tiny.load(path)


@asynccontextmanager
async def served(engine: GenerationEngine) -> AsyncIterator[Any]:
    cluster = Cluster.new()
    server = make_server()
    port = bind(server, "127.0.0.1", 0, cluster.issue("head"))
    add_ChatServicer_to_server(ChatService(engine), server)
    await server.start()
    try:
        async with connect(f"127.0.0.1:{port}", cluster.issue("asker")) as channel:
            yield ChatStub(channel)
    finally:
        engine.close()
        await server.stop(grace=None)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await listen(call)
    return caught.value


async def test_an_answer_comes_as_a_stream(tiny: Tiny) -> None:
    async with served(await tiny.engine()) as chat:
        told = await listen(chat.Generate(GenerateRequest(token_ids=PROMPT, max_tokens=24)))
    alone = await tiny.alone(PROMPT)
    assert (told.tokens, told.text, told.reason) == (alone.tokens, alone.text, "length")


REFUSED = [
    (GenerateRequest(), "INVALID_ARGUMENT", "messages: there are none, nor are there token_ids"),
    (GenerateRequest(token_ids=[1], model="big"), "NOT_FOUND", "model: 'big' is not served"),
]


@pytest.mark.parametrize(("request_", "code", "details"), REFUSED, ids=["empty", "model"])
async def test_a_status_says_what_was_wrong(
    tiny: Tiny, request_: GenerateRequest, code: str, details: str
) -> None:
    async with served(await tiny.engine()) as chat:
        error = await failure(chat.Generate(request_))
    assert error.code().name == code
    assert (error.details() or "").startswith(details)


async def test_a_full_queue_is_resource_exhausted(tiny: Tiny) -> None:
    async with served(await tiny.engine(ENDLESS, users=1, queue_limit=0)) as chat:
        running = chat.Generate(GenerateRequest(token_ids=[1]))
        await anext(aiter(running))
        error = await failure(chat.Generate(GenerateRequest(token_ids=[1])))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("kind", [UnavailableError, StageError])
async def test_a_failure_midway_reaches_the_client_as_it_was(
    tiny: Tiny, kind: type[UniclusterError]
) -> None:
    model = Fragile(tiny.model)
    async with served(await tiny.engine(model)) as chat:
        model.error, model.error_at = kind("machine bob: gone"), 5
        caught = as_error(await failure(chat.Generate(GenerateRequest(token_ids=[1]))), "head")
    assert (type(caught), str(caught)) == (kind, "machine bob: gone")


async def test_a_client_that_cancels_frees_its_caches(tiny: Tiny) -> None:
    async with served(await tiny.engine(ENDLESS, context=100_000)) as chat:
        call = chat.Generate(GenerateRequest(token_ids=[1]))
        await anext(aiter(call))
        call.cancel()
        await until(lambda: live_caches() == 0)


async def test_a_client_that_never_reads_and_leaves_frees_its_caches(tiny: Tiny) -> None:
    async with served(await tiny.engine(ENDLESS, context=100_000)) as chat:
        call = chat.Generate(GenerateRequest(token_ids=[1]))
        await until(live_caches)
        call.cancel()
        await until(lambda: live_caches() == 0)


async def test_a_deadline_ends_the_answer_and_frees_its_caches(tiny: Tiny) -> None:
    async with served(await tiny.engine(ENDLESS, context=100_000)) as chat:
        error = await failure(chat.Generate(GenerateRequest(token_ids=[1]), timeout=0.5))
        await until(lambda: live_caches() == 0)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_closing_the_engine_ends_the_streams(tiny: Tiny) -> None:
    engine = await tiny.engine(ENDLESS, context=100_000)
    async with served(engine) as chat, asyncio.timeout(scaled(DEADLINE)):
        call = chat.Generate(GenerateRequest(token_ids=[1]))
        await anext(aiter(call))
        engine.close()
        error = await failure(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_describe_says_what_is_served_and_whether_it_works(tiny: Tiny) -> None:
    engine = await tiny.engine()
    async with served(engine) as chat:
        ready = await chat.Describe(DescribeChatRequest())
        engine.fail(UnavailableError("machine bob is gone"))
        failed = await chat.Describe(DescribeChatRequest())
    assert (ready.model, ready.context, ready.users, ready.state) == ("tiny", 256, 4, "ready")
    assert (failed.state, failed.detail) == ("failed", "machine bob is gone")
