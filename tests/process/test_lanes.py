"""Several lanes over real stages: the engine's answers, whoever else is being served."""

import asyncio
import json
from collections.abc import Iterator

import jsonschema
import pytest

from tests.support.constrained import POINT, point_of
from tests.support.engines import Split, ask, listen, of_tokens, until
from tests.support.tiny import tiny_config, write_model
from unicluster.v1.chat_pb2 import GenerateRequest

PROMPTS = [[(7 * i * i + 3 * k) % 200 + 1 for i in range(20 * k + 3)] for k in range(6)]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def split(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Split]:
    path = write_model(
        tmp_path_factory.mktemp("models") / request.param, tiny_config(request.param)
    )
    split = asyncio.run(Split.open(path))
    with split.model:
        yield split


@pytest.mark.parametrize("lanes", [None, 1, 2, 4])
async def test_answers_are_those_of_one_alone(split: Split, lanes: int | None) -> None:
    engine = await split.engine(users=4, lanes=lanes)

    answers = await asyncio.gather(*(ask(engine, prompt) for prompt in PROMPTS))

    engine.close()
    assert answers == [(await split.whole.alone(prompt)).tokens for prompt in PROMPTS]


async def test_nothing_is_left_on_any_stage(split: Split) -> None:
    engine = await split.engine(users=4)
    tickets = []
    for number in range(20):
        request = GenerateRequest(token_ids=PROMPTS[number % 6], max_tokens=number % 7 + 1)
        tickets.append(await engine.submit(request))
        if number % 3 == 0:
            tickets[-1].cancel()
    for ticket in tickets:
        await listen(ticket)

    await split.until_free()
    engine.close()


# Prompts that begin like one before


KV_BYTES = 50_000_000


async def test_a_chat_s_next_turn_prefills_only_what_is_new(split: Split) -> None:
    engine = await split.engine(kv_bytes=KV_BYTES)
    first = await listen(await engine.submit(of_tokens(PROMPTS[5])))
    turn = [*PROMPTS[5], *first.tokens, *PROMPTS[1]]

    second = await listen(await engine.submit(of_tokens(turn)))

    engine.close()
    assert second.tokens == (await split.whole.alone(turn)).tokens
    assert second.finish is not None
    assert second.finish.usage.cached_tokens == len(PROMPTS[5]) + len(first.tokens)


async def test_what_can_be_trimmed_is_reused_in_part(split: Split) -> None:
    engine = await split.engine(kv_bytes=KV_BYTES)
    await ask(engine, [*PROMPTS[5][:80], 1, 2, 3])
    prompt = [*PROMPTS[5][:80], *PROMPTS[2]]

    completion = await listen(await engine.submit(of_tokens(prompt)))

    engine.close()
    trimmable = split.name == "llama"  # gemma3's windows are full
    assert completion.tokens == (await split.whole.alone(prompt)).tokens
    assert completion.finish is not None
    assert completion.finish.usage.cached_tokens == (80 if trimmable else 0)


async def test_without_reuse_nothing_is_used_and_nothing_is_kept(split: Split) -> None:
    engine = await split.engine(kv_bytes=KV_BYTES)
    await ask(engine, PROMPTS[5])
    turn = of_tokens([*PROMPTS[5], *PROMPTS[1]], no_reuse=True)

    completion = await listen(await engine.submit(turn))

    kept = engine.describe().kept_caches
    engine.close()
    assert completion.finish is not None
    assert (completion.finish.usage.cached_tokens, kept) == (0, 1)


async def test_what_is_kept_is_freed_when_running_answers_may_need_it(split: Split) -> None:
    engine = await split.engine(users=1, kv_bytes=KV_BYTES)
    await ask(engine, PROMPTS[3])
    await until(lambda: engine.describe().kept_caches == 1)
    kept = engine.describe().kept_bytes

    # All that there is, is promised to an answer that may fill the context.
    running = await engine.submit(GenerateRequest(token_ids=PROMPTS[2]))
    await anext(running)

    assert kept > 0
    assert engine.describe().kept_caches == 0
    running.cancel()
    await until(lambda: engine.describe().kept_caches == 1)  # its client may come back
    engine.close()
    await split.until_free()


async def test_what_is_promised_is_what_answers_may_come_to_and_not_more(split: Split) -> None:
    engine = await split.engine(users=2, lanes=1, kv_bytes=KV_BYTES)
    tickets = [await engine.submit(GenerateRequest(token_ids=p)) for p in PROMPTS[:3]]
    await anext(tickets[0])
    await anext(tickets[1])

    assert engine.scheduler is not None
    assert engine.scheduler.reserved == KV_BYTES  # both may fill the context
    for ticket in tickets:
        ticket.cancel()
    await until(lambda: engine.scheduler is not None and engine.scheduler.reserved == 0)
    engine.close()


# Constrained answers


async def test_constrained_answers_beside_free_ones(split: Split) -> None:
    """Their masks are made while frames are on their way, of several lanes at a time."""
    engine = await split.engine(users=4, context=512)

    free, *constrained = await asyncio.gather(
        ask(engine, PROMPTS[1]),
        *[listen(await engine.submit(point_of(prompt))) for prompt in PROMPTS[2:5]],
    )

    engine.close()
    assert free == (await split.whole.alone(PROMPTS[1])).tokens
    for completion in constrained:
        jsonschema.validate(json.loads(completion.text), POINT)
