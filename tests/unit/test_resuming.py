"""An answer goes on from any of its tokens with another engine, as if nothing had happened."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.generation.engine import GenerationEngine
from node.generation.sampling import STEPS_PER_SEED
from node.generation.ticket import Ticket
from node.speculation.drafting import Lookup, Speculation
from tests.support.constrained import point_of
from tests.support.engines import Script, Tiny, of_tokens
from tests.support.tiny import CHAT_TEMPLATE, EOS, MARKS, tiny_config, write_model
from unicluster.client.transcript import Transcript
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import (
    Constraint,
    GenerateEvent,
    GenerateRequest,
    Message,
    Reasoning,
    Resume,
    Sampling,
    Tool,
)

PROMPT = list(range(60, 90))
THINK, THOUGHT, CALL, CALLED = range(258, 258 + len(MARKS))
# Bytes of a text are tokens of the tiny tokenizer.
WITH_TOOLS = (
    CHAT_TEMPLATE
    + "{% if tools %}{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% endif %}"
)
EURO = list("a€b€".encode())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "llama", tiny_config("llama"), marks=True)


@pytest.fixture
async def tiny(path: Path) -> Tiny:
    return await Tiny.load(path)


@pytest.fixture
async def engine(tiny: Tiny) -> AsyncIterator[GenerationEngine]:
    engine = await tiny.engine(context=1024)
    yield engine
    engine.close()


async def events_of(engine: GenerationEngine, request: GenerateRequest) -> list[GenerateEvent]:
    return [event async for event in await engine.submit(request)]


def resumed(request: GenerateRequest, events: list[GenerateEvent], tokens: int) -> GenerateRequest:
    """The request for what comes behind the first `tokens` of an answer."""
    (begun,) = (event.begun for event in events if event.HasField("begun"))
    have = list(itertools.chain(*(event.delta.token_ids for event in events)))[:tokens]
    rest = GenerateRequest()
    rest.CopyFrom(request)
    for field in ("messages", "prompt", "token_ids"):
        rest.ClearField(field)
    rest.token_ids.extend(begun.prompt_token_ids)
    rest.resume.CopyFrom(Resume(token_ids=have, cached_tokens=begun.cached_tokens))
    return rest


def behind(events: list[GenerateEvent], tokens: int) -> list[GenerateEvent]:
    """Events that a client with the first `tokens` of an answer does not have."""
    rest = [event for event in events if not event.HasField("begun")]
    while tokens:
        tokens -= len(rest.pop(0).delta.token_ids)
    return rest


def seen(events: list[GenerateEvent]) -> list[Any]:
    """All that a client sees, but for times, ids of calls, and the last digits of logprobs."""
    told: list[Any] = []
    for event in events:
        if event.HasField("begun"):
            continue
        delta, finish = event.delta, event.finish
        told.append(
            (
                *(delta.text, delta.reasoning, delta.tool_call, list(delta.token_ids)),
                [(call.name, call.arguments) for call in delta.calls],
                [(each.token_id, round(each.logprob, 3), each.text) for each in delta.logprobs],
                [[top.token_id for top in each.top] for each in delta.logprobs],
                *(finish.reason, finish.stop_string),
                *(finish.usage.prompt_tokens, finish.usage.completion_tokens),
                finish.usage.cached_tokens,
            )
        )
    return told


async def assert_goes_on_from_anywhere(
    engine: GenerationEngine, request: GenerateRequest, step: int = 1
) -> list[GenerateEvent]:
    request.begun = True
    whole = await events_of(engine, request)
    assert whole[0].HasField("begun")
    count = whole[-1].finish.usage.completion_tokens
    for tokens in [*range(0, count, step), count]:
        rest = await events_of(engine, resumed(request, whole, tokens))
        assert seen(rest) == seen(behind(whole, tokens)), f"behind {tokens} tokens"
    return whole


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sampling": Sampling(temperature=1.5, seed=7, top_p=0.9)},
        {"sampling": Sampling(temperature=1.5, seed=8, presence_penalty=1, frequency_penalty=1)},
        {"sampling": Sampling(repetition_penalty=1.7, logit_bias={65: 3.0})},
        {"logprobs": 3},
        {"sampling": Sampling(temperature=1.0, seed=9), "ignore_eos": True, "no_reuse": True},
    ],
    ids=["greedy", "seed", "penalties", "repetition", "logprobs", "ignored ends"],
)
async def test_sampled_answers(engine: GenerationEngine, fields: dict[str, Any]) -> None:
    await assert_goes_on_from_anywhere(engine, of_tokens(PROMPT, max_tokens=16, **fields), step=3)


async def test_the_prompt_is_the_one_that_was_answered(engine: GenerationEngine) -> None:
    request = GenerateRequest(messages=[Message(role="user", content="hello")], max_tokens=8)
    whole = await assert_goes_on_from_anywhere(engine, request)
    assert len(whole[0].begun.prompt_token_ids) == whole[-1].finish.usage.prompt_tokens


async def test_cached_tokens_are_those_of_the_first_head(tiny: Tiny) -> None:
    engine = await tiny.engine(kv_bytes=1 << 30)
    try:
        await events_of(engine, of_tokens(PROMPT))
        whole = await assert_goes_on_from_anywhere(engine, of_tokens(PROMPT), step=6)
    finally:
        engine.close()
    assert whole[-1].finish.usage.cached_tokens == len(PROMPT) - 1


@pytest.mark.parametrize("stop", ["b€", "€b", "no"])
async def test_characters_and_stop_strings_across_the_border(tiny: Tiny, stop: str) -> None:
    engine = await tiny.engine(Script(EURO, prompt=2))
    try:
        whole = await assert_goes_on_from_anywhere(engine, of_tokens([65, 66], stop=[stop]))
    finally:
        engine.close()
    text = "".join(event.delta.text for event in whole)
    assert text == "a€b€".partition(stop)[0]
    assert whole[-1].finish.stop_string == (stop if stop in "a€b€" else "")


@pytest.mark.parametrize("single", [False, True])
async def test_reasoning_and_tool_calls(tiny: Tiny, single: bool) -> None:
    call = [CALL, *b'{"name": "clock", "arguments": {}}', CALLED]
    said = [THINK, *b"hm", THOUGHT, *b"so", *call, *call]
    tiny.tokenizer.chat_template = WITH_TOOLS
    engine = await tiny.engine(Script(said, prompt=0), context=1024)
    request = GenerateRequest(
        messages=[Message(role="user", content="hello")],
        tools=[Tool(name="clock")],
        single_tool_call=single,
        begun=True,
    )
    try:
        first = await events_of(engine, request)
        prompt = len(first[0].begun.prompt_token_ids)
        await engine.set_model(Script(said, prompt=prompt))
        whole = await assert_goes_on_from_anywhere(engine, request, step=5)
    finally:
        engine.close()
    assert [c.name for event in whole for c in event.delta.calls] == ["clock"] * (2 - single)
    assert "".join(event.delta.reasoning for event in whole) == "hm"
    assert whole[-1].finish.reason == "tool_calls"


@pytest.mark.parametrize("lookup", [False, True])
async def test_a_grammar_goes_on_where_it_was(tiny: Tiny, lookup: bool) -> None:
    speculation = Speculation(Lookup, 4) if lookup else None
    engine = await tiny.engine(context=1024, speculation=speculation)
    try:
        whole = await assert_goes_on_from_anywhere(engine, point_of(PROMPT), step=9)
        regex = of_tokens(PROMPT, constraint=Constraint(regex="(ab|cd){3}"))
        await assert_goes_on_from_anywhere(engine, regex)
    finally:
        engine.close()
    json.loads("".join(event.delta.text for event in whole))


@pytest.mark.parametrize("broke_off", [True, False])
async def test_an_answer_that_broke_off_here_goes_before_those_that_wait(
    tiny: Tiny, broke_off: bool
) -> None:
    """One that a client brings does not: anybody may say that he had a place."""
    engine = await tiny.engine(context=1024, users=1)
    order: list[str] = []

    async def watch(name: str, ticket: Ticket) -> list[GenerateEvent]:
        events = []
        async for event in ticket:
            order.append(name)
            events.append(event)
        return events

    try:
        request = of_tokens(PROMPT, max_tokens=40, ignore_eos=True, begun=True)
        whole = await events_of(engine, request)
        running = await engine.submit(of_tokens(PROMPT[:5], max_tokens=1000, ignore_eos=True))
        await anext(running)
        fresh = await engine.submit(of_tokens(PROMPT[:9], max_tokens=10, ignore_eos=True))
        rest_asked = resumed(request, whole, 30)
        rest_asked.broke_off = broke_off
        again = await engine.submit(rest_asked)
        running.cancel()
        rest, _ = await asyncio.gather(watch("again", again), watch("fresh", fresh))
    finally:
        engine.close()
    assert seen(rest) == seen(behind(whole, 30))
    assert order == sorted(order, reverse=not broke_off)  # all of one before any of the other


@pytest.mark.parametrize(
    ("resume", "reason"),
    [
        (Resume(token_ids=[264]), "resume: 264 is not in the vocabulary"),
        (Resume(token_ids=[EOS]), "resume: the answer ends before token 1 of 1"),
        (Resume(token_ids=[65, EOS, 65]), "resume: the answer ends before token 2 of 3"),
        (Resume(token_ids=[65] * 9), "resume: the answer ends before token 9 of 9"),
        (Resume(cached_tokens=30), "resume: 30 cached tokens of a prompt of 30"),
    ],
)
async def test_what_no_answer_has_is_refused(
    engine: GenerationEngine, resume: Resume, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        await engine.submit(of_tokens(PROMPT, max_tokens=8, resume=resume))


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_seeds_of_tokens_can_be_passed_over(seed: int) -> None:
    one_by_one = np.random.default_rng(seed)
    drawn = [int(one_by_one.integers(2**63)) for _ in range(500)]
    for count in (0, 1, 250, 499):
        jumped = np.random.Generator(np.random.PCG64(seed).advance(count * STEPS_PER_SEED))
        assert int(jumped.integers(2**63)) == drawn[count]


async def test_reasoning_ends_where_it_would_have(engine: GenerationEngine) -> None:
    request = of_tokens([*PROMPT, THINK], reasoning=Reasoning(effort="none"), max_tokens=12)
    whole = await assert_goes_on_from_anywhere(engine, request, step=4)
    assert whole[0].begun.most_reasoning_tokens == 0

    request.reasoning.CopyFrom(Reasoning(most_tokens=5))
    whole = await assert_goes_on_from_anywhere(engine, request, step=2)
    assert whole[0].begun.most_reasoning_tokens == 5
    transcript = Transcript(GenerateRequest(reasoning=Reasoning(effort="low", enabled=True)))
    transcript.take(whole[0])
    assert transcript.request().reasoning == Reasoning(most_tokens=5)
