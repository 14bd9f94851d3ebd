"""Machines are lost in the middle of answers, which go on as if nothing had happened.

One cluster serves all tests, and each strikes once at answers of all kinds at a time: a recovery
lasts as long as loading does.
"""

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest

from tests.support.cluster import AgentProgram, LocalCluster, ServeProgram, endless_model, until
from tests.support.deadlines import scaled
from tests.support.tiny import CHAT_TEMPLATE, EOS, write_tokenizer
from unicluster.client.answers import Delta, Finish, Status
from unicluster.client.client import AsyncClient
from unicluster.errors import DoesNotFitError, UnavailableError
from unicluster.v1 import chat_pb2 as wire

# Its cluster is the slowest of all to start; tests/unit/test_resuming.py has what answers become.
pytestmark = pytest.mark.sweep

# Three machines hold the model.
MACHINES = ("ann", "bob", "cat", "dee")
MEMORY = 5_500_000
CONTEXT = 1024
USERS = 8
TOKENS = 500
GOES_ON_WITHIN = 60.0
TEXT = {"type": "object", "properties": {"text": {"type": "string", "minLength": 400}}}
ENDLESS = {EOS: -100.0}
TOOL = {"name": "note", "parameters": TEXT}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seed": {"temperature": 1.5, "seed": 7, "top_p": 0.95, "logit_bias": ENDLESS},
    "penalties": {"temperature": 1.5, "seed": 8, "presence_penalty": 1, "logit_bias": ENDLESS},
    "stop": {"temperature": 0, "stop": ["no such text", "\n\n\n\n\n\n"]},
    "logprobs": {"temperature": 0, "logprobs": 2, "max_tokens": TOKENS // 2},
    "grammar": {"temperature": 1.0, "seed": 9, "regex": "[a-z ]{490}[.]"},
    "tools": {"temperature": 1.0, "seed": 10, "tools": [TOOL], "tool_choice": "required"},
}


@dataclass
class Heard:
    """All that a client sees of an answer, but for times and the last digits of numbers."""

    deltas: list[Delta] = field(default_factory=list)
    finish: Finish | None = None
    statuses: list[Status] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    def same_as(self, other: "Heard") -> bool:
        return self._seen() == other._seen()

    def _seen(self) -> list[Any]:
        assert self.finish is not None
        usage = self.finish.usage
        return [
            *((d.text, d.reasoning, d.tool_call, d.token_ids) for d in self.deltas),
            *((p.token_id, p.text, round(p.logprob, 3)) for d in self.deltas for p in d.logprobs),
            *((call.name, call.arguments) for d in self.deltas for call in d.calls),
            *(self.finish.reason, self.finish.stop_string),
            *(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
        ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = endless_model(tmp_path_factory.mktemp("models") / "llama")
    write_tokenizer(path, marks=True)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        CHAT_TEMPLATE + "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    )
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_agents(*MACHINES, memory=MEMORY)
        yield cluster


@pytest.fixture(scope="module")
def server(cluster: LocalCluster, model: Path) -> Iterator[ServeProgram]:
    with cluster.serve(model, "--context", str(CONTEXT), "--users", str(USERS)) as server:
        yield server


@pytest.fixture
async def client(server: ServeProgram) -> AsyncIterator[AsyncClient]:
    async with server.async_client() as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(server: ServeProgram) -> dict[str, Heard]:
    """The answers of each kind without any failure."""

    async def all_kinds() -> dict[str, Heard]:
        async with server.async_client() as client:
            return {kind: await hear(client, kind) for kind in KINDS}

    return asyncio.run(all_kinds())


def stages(cluster: LocalCluster, server: ServeProgram) -> list[AgentProgram]:
    """The machines that hold stages now, the head first. At least one is to spare."""
    for name in [name for name, agent in cluster.agents.items() if not agent.running]:
        del cluster.agents[name]
    if len(cluster.agents) < len(MACHINES):
        cluster.start_agents(f"new-{len(cluster.folder.name)}-{_count()}", memory=MEMORY)
    until(lambda: server.describe().state == "ready", "the model is served")
    return [cluster.agents[stage.node] for stage in server.describe().stages]


def _count(counted: list[int] = []) -> int:  # noqa: B006 - it counts the machines of this module
    counted.append(0)
    return len(counted)


async def hear(
    client: AsyncClient,
    kind: str,
    on_token: Callable[[int], None] = lambda count: None,
    **more: Any,
) -> Heard:
    heard = Heard()
    options = {"max_tokens": TOKENS, "no_reuse": True, **KINDS[kind], **more}
    count = 0
    async for event in client.stream(f"about {kind}", on_status=heard.statuses.append, **options):
        if isinstance(event, Finish):
            heard.finish = event
        else:
            heard.deltas.append(event)
            count += len(event.token_ids)
            on_token(count)
    return heard


async def strike_at_all(
    client: AsyncClient, undisturbed: dict[str, Heard], strike: Callable[[], Any]
) -> list[Heard]:
    """Answers of all kinds run at once, at different lengths, when `strike` is called."""
    begun = {kind: asyncio.Event() for kind in KINDS}

    def listener(kind: str, at: int) -> Callable[[int], None]:
        return lambda count: begun[kind].set() if count >= at else None

    answers = [
        asyncio.create_task(hear(client, kind, listener(kind, 10 + 7 * number)))
        for number, kind in enumerate(KINDS)
    ]
    async with asyncio.timeout(scaled(GOES_ON_WITHIN)):
        await asyncio.gather(*(event.wait() for event in begun.values()))
        strike()
        heard = await asyncio.gather(*answers)
    for kind, answer in zip(KINDS, heard, strict=True):
        assert answer.same_as(undisturbed[kind]), kind
    struck = [answer for answer in heard if answer.statuses]
    assert struck, "all answers ended before the strike"
    for answer in struck:
        states = [status.state for status in answer.statuses]
        assert states == ["recovering", "resumed"] * (len(states) // 2)
    return struck


async def recoveries(client: AsyncClient) -> wire.Recoveries:
    async with client._stub() as stub:
        return (await stub.Measure(wire.MeasureRequest())).recoveries


SWEEP = pytest.mark.sweep


@pytest.mark.parametrize("place", [1, pytest.param(0, marks=SWEEP)], ids=["middle", "head"])
async def test_a_worker_is_killed(
    cluster: LocalCluster,
    server: ServeProgram,
    client: AsyncClient,
    undisturbed: dict[str, Heard],
    place: int,
) -> None:
    agent = stages(cluster, server)[place]
    before = await recoveries(client)

    struck = await strike_at_all(client, undisturbed, agent.worker.kill)

    assert all(f"machine {agent.name} " in answer.statuses[0].detail for answer in struck)
    assert {answer.statuses[-1].cause for answer in struck} == {"killed"}
    counted = await recoveries(client)
    assert counted.resumed == before.resumed + len(struck)
    assert counted.failed == before.failed
    assert counted.replayed_tokens > before.replayed_tokens
    assert counted.load_s > before.load_s


@pytest.mark.parametrize("place", [0, pytest.param(1, marks=SWEEP)], ids=["head", "middle"])
async def test_a_machine_is_lost(
    cluster: LocalCluster,
    server: ServeProgram,
    client: AsyncClient,
    undisturbed: dict[str, Heard],
    place: int,
) -> None:
    held = stages(cluster, server)
    agent = held.pop(place)
    workers = {other.name: other.worker.pid for other in held}

    await strike_at_all(client, undisturbed, lambda: agent.send(signal.SIGKILL))

    assert {other.name: other.worker.pid for other in held} == workers  # nothing loaded again
    assert agent.name not in {stage.node for stage in server.describe().stages}


async def test_a_machine_freezes(
    cluster: LocalCluster, server: ServeProgram, client: AsyncClient, undisturbed: dict[str, Heard]
) -> None:
    agent = stages(cluster, server)[1]
    machine = [agent.worker, psutil.Process(agent.pid)]
    try:
        await strike_at_all(client, undisturbed, lambda: [each.suspend() for each in machine])
    finally:
        for process in machine:
            process.resume()


async def test_a_worker_is_killed_while_another_recovers(
    cluster: LocalCluster, server: ServeProgram, client: AsyncClient, undisturbed: dict[str, Heard]
) -> None:
    head, middle, last = stages(cluster, server)
    striking: list[asyncio.Task[None]] = []

    def again() -> None:
        until(lambda: server.describe().state != "ready", "the ring is broken")
        last.worker.kill()
        until(lambda: server.describe().state == "ready", "the ring is open again")
        head.worker.kill()

    def strike() -> None:
        middle.worker.kill()
        striking.append(asyncio.create_task(asyncio.to_thread(again)))

    await strike_at_all(client, undisturbed, strike)
    await asyncio.gather(*striking)


async def test_two_choices_over_http_go_on(
    cluster: LocalCluster, server: ServeProgram, model: Path
) -> None:
    body = {
        "model": str(model.name),
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": TOKENS,
        "temperature": 1.2,
        "seed": 5,
        "logit_bias": {str(EOS): -100},
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    agent = stages(cluster, server)[1]
    async with httpx.AsyncClient(base_url=server.http, timeout=scaled(GOES_ON_WITHIN)) as http:
        whole, comments = await _streamed(http, body, lambda: None)
        again, gaps = await _streamed(http, body, agent.worker.kill)

    assert again == whole
    assert not [line for line in comments if "recovering" in line]
    assert [line for line in gaps if line.startswith(f": recovering machine {agent.name} ")]
    assert [line for line in gaps if line.startswith(": resumed")]


async def _streamed(
    http: httpx.AsyncClient, body: dict[str, Any], strike: Callable[[], None]
) -> tuple[list[Any], list[str]]:
    """Texts, reasons and completion tokens of both choices, and the comments of the stream."""
    texts, reasons, usage, comments, chunks = ["", ""], ["", ""], 0, [], 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith(":"):
                comments.append(line)
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
                reasons[choice["index"]] = choice["finish_reason"]
            if chunk.get("usage"):
                usage = chunk["usage"]["completion_tokens"]
            if (chunks := chunks + 1) == 30:
                strike()
    return [texts, reasons, usage], comments


ASKED = {"model": "llama", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
DOORS: dict[str, dict[str, Any]] = {
    "/v1/messages": {**ASKED, "max_tokens": TOKENS, "temperature": 0},
    "/api/chat": {**ASKED, "options": {"num_predict": TOKENS, "temperature": 0}},
    "/v1/responses": {
        "model": "llama",
        "stream": True,
        "input": "hello",
        "max_output_tokens": TOKENS,
        "temperature": 0,
    },
}


async def test_answers_over_the_doors_of_other_protocols_go_on(
    cluster: LocalCluster, server: ServeProgram, model: Path
) -> None:
    agent = stages(cluster, server)[1]
    begun = {path: asyncio.Event() for path in DOORS}
    async with httpx.AsyncClient(base_url=server.http, timeout=scaled(GOES_ON_WITHIN)) as http:
        whole = {path: await _lines(http, path) for path in DOORS}
        answers = [asyncio.create_task(_lines(http, path, begun[path])) for path in DOORS]
        async with asyncio.timeout(scaled(GOES_ON_WITHIN)):
            await asyncio.gather(*(event.wait() for event in begun.values()))
            agent.worker.kill()
            again = dict(zip(DOORS, await asyncio.gather(*answers), strict=True))

    for path in DOORS:
        said, comments = _said(again[path])
        assert said == _said(whole[path])[0], path
        assert said[0]
        assert said[1] in ("max_tokens", "length", "incomplete")
        assert said[2] == TOKENS
        gaps = [line.split()[1] for line in comments if line.startswith((": rec", ": res"))]
        assert gaps == ([] if path == "/api/chat" else ["recovering", "resumed"]), path


async def _lines(
    http: httpx.AsyncClient, path: str, begun: asyncio.Event | None = None
) -> list[str]:
    lines: list[str] = []
    async with http.stream("POST", path, json=DOORS[path]) as response:
        async for line in response.aiter_lines():
            lines.append(line)
            if begun is not None and len(lines) == 40:
                begun.set()
    return lines


def _said(lines: list[str]) -> tuple[list[Any], list[str]]:
    """Text, reason and completion tokens of a stream, and its comments."""
    text, reason, tokens = "", "", 0
    values = [line.removeprefix("data: ") for line in lines]
    for value in (json.loads(value) for value in values if value.startswith("{")):
        assert "error" not in value, value
        response = value.get("response", {})
        if isinstance(delta := value.get("delta"), str):
            text += delta
        elif delta is not None:
            text += delta.get("text", "")
        text += value.get("message", {}).get("content", "") if "done" in value else ""
        reason = (delta or {}).get("stop_reason", reason) if isinstance(delta, dict) else reason
        reason = value.get("done_reason") or response.get("status") or reason
        usage = value.get("usage") or response.get("usage") or {}
        tokens = value.get("eval_count") or usage.get("output_tokens") or tokens
    return [text, reason, tokens], [line for line in lines if line.startswith(":")]


async def test_a_deadline_ends_a_recovery(
    cluster: LocalCluster, server: ServeProgram, client: AsyncClient
) -> None:
    agent = stages(cluster, server)[1]
    machine = [agent.worker, psutil.Process(agent.pid)]

    def freeze(count: int) -> None:
        for process in machine if count == 20 else ():
            process.suspend()

    try:
        with pytest.raises(UnavailableError):
            await hear(client, "greedy", freeze, deadline=2.0)
    finally:
        for process in machine:
            process.resume()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"begun": True}, "begun: only the coordinator"),
        ({"resume": wire.Resume(token_ids=[10_000_000])}, "resume: 10000000 is not in the voc"),
        ({"resume": wire.Resume(token_ids=[66, EOS, 66])}, "resume: the answer ends before"),
        ({"resume": wire.Resume(token_ids=[66] * 2 * CONTEXT)}, "resume: the answer ends before"),
        ({"resume": wire.Resume(cached_tokens=1)}, "resume: 1 cached tokens of a prompt of 1"),
        ({"resume_s": 1e9}, "resume_s: between 0 and"),
    ],
)
async def test_a_part_of_an_answer_that_can_be_none_is_refused(
    client: AsyncClient, fields: dict[str, Any], complaint: str
) -> None:
    async with client._stub() as stub:
        call = stub.Generate(wire.GenerateRequest(token_ids=[65], **fields))
        with pytest.raises(grpc.aio.AioRpcError, match=complaint):
            await call.read()


async def test_where_it_no_longer_fits_answers_end_with_what_is_missing(
    cluster: LocalCluster, server: ServeProgram, client: AsyncClient, undisturbed: dict[str, Heard]
) -> None:
    """The last test of this cluster: it leaves too few machines, until another joins."""
    held = stages(cluster, server)
    for agent in cluster.agents.values():
        if agent not in held:
            agent.send(signal.SIGTERM)
            agent.result()
    lost = held[1]

    with pytest.raises(DoesNotFitError) as error:
        await hear(client, "greedy", lambda count: lost.kill() if count == 20 else None)

    print(error.value)
    assert re.search(
        rf"machine {lost.name} .*; llama can't go on: .* MB are missing", str(error.value)
    )
    until(lambda: server.describe().state == "failed", "it knows that nothing can be done")
    cluster.start_agent("last", memory=MEMORY)
    until(lambda: server.describe().state == "ready", "it is served again by itself")
    assert (await hear(client, "greedy")).same_as(undisturbed["greedy"])
