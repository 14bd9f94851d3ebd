"""The client library against a real server: what it returns, and how it fails."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.chat_server import ChatServer, chat_server, until
from unicluster.client.answers import Delta, Finish
from unicluster.client.client import AsyncClient, Client
from unicluster.cluster.discovery import Advertisement
from unicluster.cluster.records import Kind
from unicluster.errors import (
    BusyError,
    InputError,
    NotFoundError,
    TrustError,
    UnavailableError,
    UniclusterError,
)
from unicluster.trust.cluster import Cluster

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with chat_server(Cluster.new()) as running:
        yield running


@pytest.fixture
def client(server: ChatServer) -> Iterator[Client]:
    with Client(server.address, cluster=server.cluster) as connected:
        yield connected


def test_an_answer_has_text_tokens_usage_and_timings(client: Client) -> None:
    answer = client.chat("hello there")

    assert answer.text == "You said: hello there"
    assert answer.token_ids == (0, 1, 2, 3)
    assert [entry.token_id for entry in answer.logprobs] == [0, 1, 2, 3]
    assert answer.logprobs[3].top[0].logprob == -0.25
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 4)
    assert answer.timings.time_to_first_token_s == 0.12
    assert answer.finish_reason == "stop"


def test_a_stream_gives_each_piece_and_ends_with_the_finish(client: Client) -> None:
    *pieces, last = client.stream("hi")

    assert [piece.text for piece in pieces if isinstance(piece, Delta)] == ["You", " said:", " hi"]
    assert isinstance(last, Finish)


def test_reasoning_is_kept_apart_from_the_text(client: Client) -> None:
    answer = client.chat("think")

    assert (answer.reasoning, answer.text) == ("Let me see. A spider...", "Eight.")


async def test_the_async_client_gives_the_same_answer(server: ChatServer, client: Client) -> None:
    async with AsyncClient(server.address, cluster=server.cluster) as other:
        assert await other.chat("hello") == client.chat("hello")
        assert [event async for event in other.stream("hi")] == list(client.stream("hi"))
        assert await other.describe() == client.describe()


def test_every_option_reaches_the_server(client: Client) -> None:
    sampling = {
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": "7",  # JSON has no 64-bit integers
    }
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "request"},
    ]

    answer = client.chat(
        conversation,
        model="parrot",
        temperature=0,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=7,
        max_tokens=10,
        stop=["\n", "END"],
        logprobs=0,
        deadline=30,
        trace=True,
    )

    assert json.loads(answer.text) == {
        "model": "parrot",
        "messages": conversation,
        "sampling": sampling,
        "max_tokens": 10,
        "stop": ["\n", "END"],
        "logprobs": 0,
        "trace": True,
    }


def test_a_prompt_may_be_token_ids(client: Client) -> None:
    answer = client.chat([5, 6, 7], max_tokens=4, ignore_eos=True, no_reuse=True)

    assert json.loads(answer.text) == {
        "token_ids": [5, 6, 7],
        "max_tokens": 4,
        "ignore_eos": True,
        "no_reuse": True,
    }


def test_options_left_out_or_none_are_not_sent(client: Client) -> None:
    sent = json.loads(client.chat("request", temperature=None, stop=None).text)

    assert sent == {"messages": [{"role": "user", "content": "request"}]}


def test_calls_and_tools_are_sent_in_their_own_form_and_in_openais(client: Client) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    tool = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    wrapped_call = {"name": "add", "arguments": '{"a": 1}'}
    asked = {"role": "user", "content": "request"}
    result = {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"}

    for one_call, one_tool in (
        ({"id": "c1", **call}, tool),
        ({"id": "c1", "type": "function", "function": wrapped_call}, {"function": tool}),
    ):
        thought = {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [one_call]}
        sent = json.loads(
            client.chat(
                [asked, {**thought, "content": None}, result, asked],
                tools=[one_tool],
                template_arguments={"enable_thinking": False},
            ).text
        )
        assert sent["messages"][1] == {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "c1", "name": "add", "arguments": '{"a": 1}'}],
        }
        assert sent["messages"][2]["tool_call_id"] == "c1"
        assert sent["messages"][2]["name"] == "add"
        assert sent["tools"] == [{**tool, "parameters": '{"type": "object"}'}]
        assert json.loads(sent["template_arguments"]) == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("messages", "options", "complaint"),
    [
        ("", {}, "the prompt is empty"),
        (" \n", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([{"role": "user"}], {}, r"messages\[0\] must be a role and a content"),
        ([{"role": "user", "content": 3}], {}, r"messages\[0\].content must be text"),
        ([{"role": "boss", "content": "hi"}], {}, r"messages\[0\].role can't be 'boss'"),
        ("broken \udcff", {}, r"messages\[0\].content must be text of Unicode"),
        ([USER | {"colour": "red"}], {}, r"messages\[0\] can't have 'colour'"),
        ([USER, 3], {}, r"messages\[1\] must be a dict"),
        ([USER | {"tool_calls": "f()"}], {}, r"messages\[0\].tool_calls must be a list"),
        ([USER | {"tool_calls": [{"name": 3}]}], {}, r"tool_calls\[0\].name must be text"),
        ([USER | {"tool_calls": [{"f": 3}]}], {}, r"messages\[0\].tool_calls\[0\] can't have 'f'"),
        ([USER | {"tool_calls": [{"arguments": 3}]}], {}, r"arguments must be an object of JSON"),
        ("hi", {"tools": [{"type": "retrieval"}]}, r"tools\[0\].type can't be 'retrieval'"),
        ("hi", {"tools": [{"function": {"code": "f"}}]}, r"function can't have 'code'"),
        ("hi", {"tools": [{"name": "f", "strict": 1}]}, r"strict must be true or false"),
        ("hi", {"tools": [{"name": "f", "function": {"name": "f"}}]}, "name is there twice"),
        ("hi", {"template_arguments": {"a": {1, 2}}}, "template_arguments must be an object"),
        ("hi", {"template_arguments": {"a": float("inf")}}, "template_arguments must be an object"),
        ("hi", {"max_tokens": -1}, "max_tokens can't be -1"),
        ("hi", {"temperature": "hot"}, "temperature can't be 'hot'"),
        ("hi", {"top_k": 1.5}, "top_k can't be 1.5"),
        ("hi", {"stop": [1]}, r"stop can't be \[1\]"),
        ("hi", {"deadline": 0}, "deadline can't be 0"),
    ],
)
def test_nonsense_is_refused_before_it_is_sent(messages: Any, options: Any, complaint: str) -> None:
    client = Client("127.0.0.1:1", cluster=Cluster.new())  # nothing listens there

    with pytest.raises(InputError, match=complaint):
        client.stream(messages, **options)


def test_an_unknown_option_is_a_mistake_of_the_program() -> None:
    options: Any = {"temprature": 1}

    with pytest.raises(TypeError, match="temprature"):
        Client("127.0.0.1:1", cluster=Cluster.new()).stream("hi", **options)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", InputError),
        ("NOT_FOUND", NotFoundError),
        ("RESOURCE_EXHAUSTED", BusyError),
        ("UNAVAILABLE", UnavailableError),
        ("PERMISSION_DENIED", TrustError),
    ],
)
@pytest.mark.parametrize("when", ["refuse", "break"])
async def test_a_status_becomes_the_error_it_means(
    server: ChatServer, client: Client, when: str, code: str, kind: type[UniclusterError]
) -> None:
    prompt = f"{when} {code} top_p: must be at most 1"

    with pytest.raises(kind, match="top_p: must be at most 1"):
        client.chat(prompt)
    async with AsyncClient(server.address, cluster=server.cluster) as other:
        with pytest.raises(kind, match="top_p: must be at most 1"):
            await other.chat(prompt)


def test_a_passed_deadline_is_said(client: Client) -> None:
    with pytest.raises(UnavailableError, match="in time"):
        client.chat("silence", deadline=0.2)


async def test_a_stream_that_ends_without_a_finish_raises(
    server: ChatServer, client: Client
) -> None:
    with pytest.raises(UnavailableError, match="broke off"):
        client.chat("end")
    async with AsyncClient(server.address, cluster=server.cluster) as other:
        with pytest.raises(UnavailableError, match="broke off"):
            await other.chat("end")


def test_a_server_that_dies_in_the_middle_raises() -> None:
    with chat_server(Cluster.new()) as doomed:
        events = Client(doomed.address, cluster=doomed.cluster).stream("hold")
        next(events)

        doomed.process.kill()

        with pytest.raises(UnavailableError, match=doomed.address):
            next(events)


async def test_breaking_out_of_a_stream_cancels_the_answer(
    server: ChatServer, client: Client
) -> None:
    for _ in client.stream("hold"):
        break
    until(lambda: client.describe().live_caches == 0)

    events = client.stream("hold")
    next(events)
    assert client.describe().live_caches == 1
    events.close()
    until(lambda: client.describe().live_caches == 0)

    async with AsyncClient(server.address, cluster=server.cluster) as other:
        story = other.stream("hold")
        await anext(story)
        assert client.describe().live_caches == 1
        await story.aclose()
        until(lambda: client.describe().live_caches == 0)


def test_the_tokens_of_a_prompt_are_counted(client: Client) -> None:
    assert client.count_tokens("one two three") == 3


def test_what_is_served_is_described(client: Client) -> None:
    info = client.describe()

    assert (info.model, info.quant, info.context, info.state) == ("parrot", "q4", 4096, "ready")
    assert [(stage.node, stage.end_layer) for stage in info.stages] == [("ann", 8), ("bob", 12)]


def test_a_client_of_another_cluster_is_told_so(server: ChatServer) -> None:
    stranger = Client(server.address, cluster=Cluster.new())

    with pytest.raises(TrustError, match="certificate of this cluster"):
        stranger.chat("hi")


def test_nobody_there_is_said_with_the_address() -> None:
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 refuses connections"):
        Client("127.0.0.1:1", cluster=Cluster.new()).chat("hi")


def test_the_server_may_be_named_by_the_environment(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNICLUSTER_SERVER", server.address)

    assert Client(cluster=server.cluster).chat("hi").text == "You said: hi"


def test_a_machine_in_no_cluster_is_told_to_join(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNICLUSTER_HOME", str(tmp_path))

    with pytest.raises(TrustError, match="unicluster join"):
        Client("127.0.0.1:1").chat("hi")


async def test_the_front_door_is_found_by_mdns(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNICLUSTER_SERVER", raising=False)
    port = int(server.address.rpartition(":")[2])
    # Slow: before it advertises, a machine asks for 2 s whether another has its name.

    async with Advertisement(Kind.CHAT, "parrot", port, server.cluster.fingerprint):
        async with AsyncClient(cluster=server.cluster) as client:
            assert (await client.chat("hi")).text == "You said: hi"
        # The sync client must not need the loop that advertises.
        found = await asyncio.to_thread(Client(cluster=server.cluster).chat, "hi")
        assert found.text == "You said: hi"


async def test_no_front_door_is_said_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNICLUSTER_SERVER", raising=False)
    client = AsyncClient(cluster=Cluster.new(), timeout=0.3)

    with pytest.raises(UnavailableError, match="unicluster serve"):
        await client.chat("hi")
