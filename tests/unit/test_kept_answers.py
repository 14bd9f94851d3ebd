"""Clients whose connection, or whose coordinator, is lost in the middle of an answer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import grpc
import pytest

from coordinator.recovery import kept_answers
from coordinator.serving.chat_door import ChatDoor
from tests.support import cluster
from tests.support.deadlines import scaled
from tests.support.spelling import TEXT, TOKENS, SpellingServer, spelling_server
from unicluster.client.answers import Answer, Status, collect
from unicluster.client.client import AsyncClient, Client
from unicluster.cluster.channels import connect
from unicluster.errors import InputError, UnavailableError
from unicluster.v1 import chat_pb2 as wire
from unicluster.v1.chat_pb2_grpc import ChatStub

# Longer than any test.
LONG = 300.0


@pytest.fixture
async def server() -> AsyncIterator[SpellingServer]:
    async with spelling_server() as server:
        yield server


async def until(condition: Callable[[], Any]) -> None:
    await asyncio.to_thread(cluster.until, condition, "that")


class Listener:
    """A client that listens to one answer, with an event loop or on a thread without one."""

    def __init__(self, server: SpellingServer, kind: str = "async", **options: Any) -> None:
        self.statuses: list[str] = []
        self.events: list[Any] = []
        deadline = options.pop("deadline", None)
        asked = {"deadline": deadline, "on_status": self._note}
        arguments = {"cluster": server.cluster, **options}
        if kind == "async":
            client = AsyncClient(server.address, **arguments)
            self._task = asyncio.create_task(self._listen(client, asked))
        else:
            plain = Client(server.address, **arguments)
            self._task = asyncio.create_task(asyncio.to_thread(self._listen_here, plain, asked))

    @property
    def text(self) -> str:
        return "".join(getattr(event, "text", "") for event in self.events)

    @property
    def tokens(self) -> int:
        return sum(len(getattr(event, "token_ids", ())) for event in self.events)

    async def heard(self, tokens: int) -> None:
        """Returns once so many tokens have come, or the answer has ended."""
        await until(lambda: self.tokens >= tokens or self._task.done())

    async def answer(self) -> Answer:
        async with asyncio.timeout(scaled(60)):
            await self._task
        return collect(self.events)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _note(self, status: Status) -> None:
        self.statuses.append(status.state)

    async def _listen(self, client: AsyncClient, asked: Any) -> None:
        async with client:
            async for event in client.stream("spell", **asked):
                self.events.append(event)

    def _listen_here(self, client: Client, asked: Any) -> None:
        with client:
            for event in client.stream("spell", **asked):
                self.events.append(event)


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_kept_answer_goes_on_while_its_client_is_away(
    server: SpellingServer, kind: str
) -> None:
    listener = Listener(server, kind, resume=LONG)
    server.head.allow(5)
    await listener.heard(5)
    server.line.cut()
    server.head.allow()
    await until(lambda: server.head.sent == TOKENS)
    server.line.mend()

    answer = await listener.answer()

    assert answer.text == TEXT
    assert answer.token_ids == tuple(range(TOKENS))
    assert answer.usage.completion_tokens == TOKENS
    assert listener.statuses == ["lost", "resumed"]
    assert len(server.head.asked) == 1


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_without_a_promise_nothing_is_kept_and_the_client_asks_for_the_rest(
    server: SpellingServer, kind: str
) -> None:
    listener = Listener(server, kind, resume=None)
    server.head.allow(5)
    await listener.heard(5)
    server.line.cut()
    await until(lambda: server.head.live == 0)
    server.head.allow()
    server.line.mend()

    answer = await listener.answer()

    assert answer.text == TEXT
    assert answer.token_ids == tuple(range(TOKENS))
    _, again = server.head.asked
    assert list(again.resume.token_ids) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("resume", [None, LONG])
async def test_an_answer_goes_on_with_a_coordinator_that_knows_nothing_of_it(
    server: SpellingServer, resume: float | None
) -> None:
    listener = Listener(server, resume=resume)
    for tokens in (5, 11):
        server.head.allow(tokens)
        await listener.heard(tokens)
        await server.stop()
        await server.start()
    server.head.allow()

    answer = await listener.answer()

    assert answer.text == TEXT
    assert listener.statuses == ["lost", "resumed"] * 2
    assert [len(each.resume.token_ids) for each in server.head.asked] == [0, 5, 11]


async def test_an_answer_that_has_not_begun_is_asked_for_again(server: SpellingServer) -> None:
    listener = Listener(server, resume=LONG)
    await until(lambda: server.head.live == 1)
    await server.stop()
    await server.start()
    server.head.allow()
    assert (await listener.answer()).text == TEXT


@pytest.mark.parametrize("resume", [0, None, LONG])
async def test_a_client_that_does_not_want_the_rest_frees_it_at_once(
    server: SpellingServer, resume: float | None
) -> None:
    listener = Listener(server, resume=resume)
    server.head.allow(5)
    await listener.heard(5)
    await listener.stop()
    await until(lambda: server.head.live == 0)


async def test_who_stays_away_longer_than_said_frees_it(server: SpellingServer) -> None:
    listener = Listener(server, resume=0.2)
    server.head.allow(5)
    await listener.heard(5)
    server.line.cut()
    await until(lambda: server.head.live == 0)
    with pytest.raises(UnavailableError):
        await listener.answer()
    assert TEXT.startswith(listener.text)


async def test_a_client_that_does_not_come_back_says_what_was_lost(server: SpellingServer) -> None:
    listener = Listener(server, resume=0)
    server.head.allow(5)
    await listener.heard(5)
    server.line.cut()
    with pytest.raises(UnavailableError, match=server.address):
        await listener.answer()
    assert listener.statuses == []


async def test_a_deadline_ends_the_coming_back(server: SpellingServer) -> None:
    listener = Listener(server, resume=LONG, deadline=2.0)
    server.head.allow(5)
    await listener.heard(5)
    server.line.cut()
    with pytest.raises(UnavailableError):
        await listener.answer()
    await until(lambda: server.head.live == 0)


async def test_an_answer_belongs_to_the_key_that_asked_for_it(server: SpellingServer) -> None:
    me, other = (server.cluster.client_access.issue("me") for _ in range(2))
    async with connect(server.address, me) as mine, connect(server.address, other) as theirs:
        call = ChatStub(mine).Generate(wire.GenerateRequest(resume_s=LONG, token_ids=[1]))
        kept = (await call.read()).kept
        assert (len(kept.answer_id) >= 20, kept.resume_s) == (True, LONG)
        for stolen in (kept.answer_id, "", "x" * 4096):
            asked = wire.ContinueRequest(answer_id=stolen)
            with pytest.raises(grpc.aio.AioRpcError, match="no such answer"):
                await ChatStub(theirs).Continue(asked).read()
            await ChatStub(theirs).Abandon(wire.AbandonRequest(answer_id=stolen))
        assert (await call.read()).HasField("begun")

        newer = ChatStub(mine).Continue(wire.ContinueRequest(answer_id=kept.answer_id, events=1))
        server.head.allow()
        assert (await newer.read()).delta.text == "<"
        with pytest.raises(grpc.aio.AioRpcError, match="newer connection"):
            await _read_all(call)
        unknown = wire.ContinueRequest(answer_id=kept.answer_id, events=1000)
        with pytest.raises(grpc.aio.AioRpcError, match="events: there are no 1000"):
            await ChatStub(mine).Continue(unknown).read()


class Gone:
    """The context of a call whose client leaves before its first event."""

    def __init__(self, server: SpellingServer) -> None:
        self._server = server
        self._identity = server.cluster.client_access.issue("me")

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._identity.cert_pem.encode()]}

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> None:
        return None

    async def write(self, _: wire.GenerateEvent) -> None:
        await until(lambda: self._server.head.live == 1)
        raise asyncio.CancelledError


async def test_who_leaves_before_the_first_event_frees_it_too(server: SpellingServer) -> None:
    door, gone = ChatDoor(server.gateway), cast(Any, Gone(server))
    with pytest.raises(asyncio.CancelledError):
        await door.Generate(wire.GenerateRequest(resume_s=0.1, token_ids=[1]), gone)
    await until(lambda: server.head.live == 0)


async def test_what_is_kept_is_bounded(
    server: SpellingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_answers, "MOST_BYTES", 1000)
    server.head.padding = "-" * 500
    server.head.allow()
    identity = server.cluster.client_access.issue("me")
    async with connect(server.address, identity) as channel:
        stub = ChatStub(channel)
        request = wire.GenerateRequest(resume_s=LONG, token_ids=[1])
        call = stub.Generate(request)
        kept = (await call.read()).kept
        call.cancel()
        # The door passes some on before it knows that its client has left.
        await until(lambda: server.gateway.running == 1)
        rest = stub.Continue(wire.ContinueRequest(answer_id=kept.answer_id, events=0))
        events = await _read_all(rest)
        assert events[0].HasField("begun")
        assert events[-1].HasField("finish")
        again = wire.ContinueRequest(answer_id=kept.answer_id, events=1)
        with pytest.raises(grpc.aio.AioRpcError, match="are not kept any more"):
            await stub.Continue(again).read()

        monkeypatch.setattr(kept_answers, "MOST_OF_ONE", 1)
        server.head.allow(0)
        first, second = stub.Generate(request), stub.Generate(request)
        both = [await first.read(), await second.read()]
        assert sorted(event.WhichOneof("event") for event in both) == ["begun", "kept"]
        assert {kept.answer_id, *(event.kept.answer_id for event in both)} > {kept.answer_id, ""}
    await until(lambda: server.head.live == 1)  # the one that is kept


async def _read_all(call: Any) -> list[wire.GenerateEvent]:
    events = []
    while isinstance(event := await call.read(), wire.GenerateEvent):
        events.append(event)
    return events


@pytest.mark.parametrize("seconds", [-1.0, 1e9, float("nan"), float("inf")])
async def test_times_that_are_none_are_refused(server: SpellingServer, seconds: float) -> None:
    with pytest.raises(InputError, match="resume"):
        await AsyncClient(server.address, cluster=server.cluster, resume=seconds).chat("spell")
    assert not server.head.asked


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_client_waits_for_a_server_that_loads(server: SpellingServer, kind: str) -> None:
    server.head.allow()
    server.service.state = "loading"
    listener = Listener(server, kind, wait=LONG)
    await until(lambda: listener.statuses == ["loading"])
    server.service.state = "recovering"
    await until(lambda: listener.statuses == ["loading", "recovering"])
    server.service.state = "ready"

    assert (await listener.answer()).text == TEXT
    assert listener.statuses == ["loading", "recovering", "ready"]


async def test_a_client_waits_no_longer_than_it_said(server: SpellingServer) -> None:
    server.service.state = "loading"
    for seconds in (0, 0.2):
        with pytest.raises(UnavailableError, match="loading"):
            await Listener(server, wait=seconds).answer()
    server.service.state = "failed"
    with pytest.raises(UnavailableError, match="is failed"):
        await Listener(server, wait=LONG).answer()
    assert not server.head.asked


async def test_an_answer_of_a_closed_client_is_let_go_of_in_silence(server: SpellingServer) -> None:
    server.head.allow(2)
    client = AsyncClient(server.address, cluster=server.cluster, resume=LONG)
    stream = client.stream("spell")
    await anext(stream)
    await client.close()
    await stream.aclose()

    plain = Client(server.address, cluster=server.cluster, resume=LONG)
    events = plain.stream("spell")
    await asyncio.to_thread(next, events)
    await asyncio.to_thread(plain.close)
    await asyncio.to_thread(events.close)


async def test_who_is_cancelled_while_letting_go_of_an_answer_is_cancelled(
    server: SpellingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def hang(*_: Any) -> None:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(ChatDoor, "Abandon", hang)
    monkeypatch.setattr("unicluster.client.client.ABANDON_SECONDS", LONG)
    await server.stop()
    await server.start()
    server.head.allow()
    async with AsyncClient(server.address, cluster=server.cluster, resume=LONG) as client:
        asking = asyncio.create_task(client.chat("spell"))
        async with asyncio.timeout(scaled(60)):
            await asked.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
