"""Caches of answers whose client left: they are there when it comes back for the rest."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.generation.engine import GenerationEngine
from node.generation.prefix_cache import CachedPrefix, PrefixCache
from node.speculation.drafting import Lookup, Speculation
from tests.support.engines import Tiny, of_tokens, until
from tests.support.guessing import configuration
from tests.support.tiny import tiny_config, write_model
from unicluster.errors import StageError
from unicluster.v1.chat_pb2 import GenerateEvent, GenerateRequest, Resume, Sampling

PROMPT = list(range(60, 90))
OTHER = list(range(190, 150, -1))
KV_BYTES = 50_000_000
TOKENS = 24


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", tiny_config("llama"))


@pytest.fixture
async def tiny(path: Path) -> Tiny:
    return await Tiny.load(path)


@pytest.fixture
async def engine(tiny: Tiny) -> AsyncIterator[GenerationEngine]:
    engine = await tiny.engine(kv_bytes=KV_BYTES, context=1024)
    yield engine
    engine.close()


def asked(prompt: list[int], **fields: Any) -> GenerateRequest:
    return of_tokens(prompt, **({"max_tokens": TOKENS, "ignore_eos": True, "begun": True} | fields))


async def events_of(engine: GenerationEngine, request: GenerateRequest) -> list[GenerateEvent]:
    return [event async for event in await engine.submit(request)]


def tokens_of(events: list[GenerateEvent]) -> list[int]:
    return list(itertools.chain(*(event.delta.token_ids for event in events)))


async def broken_off(engine: GenerationEngine, request: GenerateRequest, tokens: int) -> list[int]:
    """Leaves an answer after some of its tokens, which are returned; its caches can be claimed."""
    ticket, got = await engine.submit(request), list[int]()
    async for event in ticket:
        got += event.delta.token_ids
        if len(got) >= tokens:
            break
    ticket.cancel()
    await engine.settle()
    return got


def rest_of(request: GenerateRequest, have: list[int]) -> GenerateRequest:
    rest = GenerateRequest()
    rest.CopyFrom(request)
    rest.resume.CopyFrom(Resume(token_ids=have))
    return rest


def cached(events: list[GenerateEvent]) -> int:
    (begun,) = (event.begun for event in events if event.HasField("begun"))
    return begun.cached_tokens


@pytest.mark.parametrize(
    "fields",
    [{}, {"sampling": Sampling(temperature=1.5, seed=7, top_p=0.9)}],
    ids=["greedy", "seed"],
)
async def test_an_answer_goes_on_behind_any_token_and_computes_nothing_again(
    engine: GenerationEngine, fields: dict[str, Any]
) -> None:
    request = asked(PROMPT, **fields)
    whole = tokens_of(await events_of(engine, asked(PROMPT, no_reuse=True, **fields)))

    for tokens in range(1, TOKENS - 1):
        have = await broken_off(engine, request, tokens)
        events = await events_of(engine, rest_of(request, have))
        assert have + tokens_of(events) == whole, f"behind {tokens} tokens"
        assert cached(events) == len(PROMPT) + len(have) - 1  # the last one is always computed


async def test_a_client_that_had_less_than_was_computed_gets_the_rest(
    engine: GenerationEngine,
) -> None:
    request = asked(PROMPT)
    whole = tokens_of(await events_of(engine, asked(PROMPT, no_reuse=True)))
    got = await broken_off(engine, request, 12)

    for have in range(len(got)):
        events = await events_of(engine, rest_of(request, whole[:have]))
        assert whole[:have] + tokens_of(events) == whole
        assert cached(events) == len(PROMPT) + have - 1


async def test_tokens_that_are_others_share_what_is_before_them(engine: GenerationEngine) -> None:
    request = asked(PROMPT)
    got = await broken_off(engine, request, 12)
    others = [*got[:6], *((token + 1) % 200 + 1 for token in got[6:])]

    events = await events_of(engine, rest_of(request, others))

    assert cached(events) == len(PROMPT) + 6
    fresh = await events_of(engine, rest_of(asked(PROMPT, no_reuse=True), others))
    assert tokens_of(events) == tokens_of(fresh)


async def test_answers_of_one_batch_all_find_their_caches(engine: GenerationEngine) -> None:
    requests = [asked(prompt) for prompt in (PROMPT, OTHER, PROMPT[5:])]
    wholes = [
        tokens_of(await events_of(engine, asked(list(r.token_ids), no_reuse=True)))
        for r in requests
    ]
    tickets = [await engine.submit(request) for request in requests]
    had: list[list[int]] = [[] for _ in tickets]

    async def hear(index: int, tokens: int) -> None:
        async for event in tickets[index]:
            had[index] += event.delta.token_ids
            if len(had[index]) >= tokens:
                return

    await asyncio.gather(*(hear(index, 4 + 5 * index) for index in range(3)))
    await engine.settle()  # which ends them all
    events = await asyncio.gather(
        *(events_of(engine, rest_of(r, have)) for r, have in zip(requests, had, strict=True))
    )

    for whole, have, again, request in zip(wholes, had, events, requests, strict=True):
        assert have + tokens_of(again) == whole
        assert cached(again) == len(request.token_ids) + len(have) - 1


@pytest.mark.parametrize("kind", ["gemma3", "lfm2", "llama4"])
async def test_caches_that_can_not_be_trimmed_are_used_whole_or_not_at_all(
    tmp_path: Path, kind: str
) -> None:
    """Rotating windows, states, and chunks: whatever is in them, the text is the same."""
    tiny = await Tiny.load(write_model(tmp_path / kind, configuration(kind)))
    engine = await tiny.engine(kv_bytes=KV_BYTES, context=1024)
    prompt = PROMPT * 3
    whole = tokens_of(await events_of(engine, asked(prompt, no_reuse=True)))

    for tokens in (1, 5, 9, 16):
        have = await broken_off(engine, asked(prompt), tokens)
        events = await events_of(engine, rest_of(asked(prompt), have))
        assert have + tokens_of(events) == whole, f"behind {tokens} tokens"

    engine.close()


async def test_with_drafted_tokens_too(tiny: Tiny) -> None:
    speculation = Speculation(Lookup, 4)
    engine = await tiny.engine(kv_bytes=KV_BYTES, context=1024, speculation=speculation)
    prompt = [*PROMPT, *PROMPT]
    whole = tokens_of(await events_of(engine, asked(prompt, no_reuse=True)))

    for tokens in range(1, TOKENS - 6, 3):
        have = await broken_off(engine, asked(prompt), tokens)
        events = await events_of(engine, rest_of(asked(prompt), have))
        assert have + tokens_of(events) == whole
        assert cached(events) >= len(prompt) + len(have) - 2

    engine.close()


async def test_a_prompt_that_was_computed_in_part_is_not_begun_anew(tiny: Tiny) -> None:
    engine = await tiny.engine(kv_bytes=KV_BYTES, context=4096, prefill_step=16)
    request = asked([PROMPT[i % 30] for i in range(700)], max_tokens=2)
    ticket = await engine.submit(request)
    scheduler = engine.scheduler
    assert scheduler is not None
    await until(lambda: scheduler.prefilled >= 64)
    ticket.cancel()
    await engine.settle()

    events = await events_of(engine, request)

    assert 64 <= cached(events) < 700
    engine.close()


async def test_nothing_is_kept_of_an_answer_that_is_not_to_be_reused(
    engine: GenerationEngine,
) -> None:
    await broken_off(engine, asked(PROMPT, no_reuse=True), 8)

    assert engine.describe().kept_caches == 0


async def test_what_failed_is_not_kept(engine: GenerationEngine) -> None:
    ticket = await engine.submit(asked(PROMPT, max_tokens=900))
    await anext(ticket)
    ticket.end(StageError("odd"))
    await engine.settle()

    assert engine.describe().kept_caches == 0


async def test_settling_ends_what_waits_in_the_queue(tiny: Tiny) -> None:
    engine = await tiny.engine(kv_bytes=KV_BYTES, users=1, context=1024)
    tickets = [await engine.submit(asked(PROMPT, max_tokens=900)) for _ in range(3)]

    await engine.settle()

    assert all(ticket.ended for ticket in tickets)
    assert engine.measure().running == engine.measure().waiting == 0
    engine.close()


# The prefix cache


def entry(tokens: list[int], nbytes: int = 10) -> CachedPrefix:
    return CachedPrefix(np.array(tokens), [], nbytes=nbytes, trimmable=True)


def test_the_entry_of_an_answer_that_goes_on_makes_room_before_those_that_wait() -> None:
    cache, one, other = PrefixCache(), entry(PROMPT), entry(OTHER)
    cache.add(one)
    cache.add(other)

    assert cache.find([*OTHER, 1], once=True) == (other, len(OTHER))
    assert cache.shrink(10) == [other]
    assert one in cache
    assert other not in cache


def test_an_entry_that_was_taken_is_used_up() -> None:
    one = CachedPrefix(np.array(PROMPT), [object()], nbytes=10, trimmable=True)

    assert len(one.take_prefix(len(PROMPT))) == 1
    assert one.cache == []
