"""Prompts that share a beginning, over stages whose caches can't be trimmed by some tokens."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

import unicluster
from node.generation.engine import GenerationEngine
from node.ggml.layout import cache_bytes
from node.ggml.load import DEFAULT_CONTEXT, open_gguf
from tests.support.any_gguf import with_tokenizer
from tests.support.engines import THREAD, Completion, Split, Tiny, listen, of_tokens
from tests.support.tiny import EOS
from unicluster.checkpoints.fingerprint import whole

BEGIN, END = EOS + 1, EOS  # special tokens of the tiny tokenizer
SYSTEM = [(7 * i * i + 3) % 200 + 1 for i in range(60)]
MESSAGE = [(5 * i * i + 11) % 200 + 1 for i in range(30)]
EDITED = [*MESSAGE[:25], 9, 8, 7]


@pytest.fixture(scope="module", params=["mamba", "qwen35", "deepseek4"])
def split(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Split]:
    """States alone, states beside attention, and attention that is compressed."""
    file = with_tokenizer(tmp_path_factory.mktemp("models"), request.param)

    async def load() -> Split:
        alone = Tiny(*await THREAD.run(lambda: unicluster.load(str(file), local_nodes=1)))
        cut = await THREAD.run(lambda: unicluster.load(str(file), local_nodes=2))
        return Split(*cut, alone, str(file))

    split = asyncio.run(load())
    with split.model, split.whole.model:
        yield split


def chat(*messages: list[int]) -> list[int]:
    """Tokens of messages, and of the answer's beginning."""
    return [token for message in messages for token in (BEGIN, *message, END)] + [BEGIN]


async def engine_of(split: Split, users: int = 1) -> GenerationEngine:
    """An engine with as many bytes for caches as its stages have."""
    gguf = open_gguf(whole(Path(split.name)))
    return await split.engine(users=users, kv_bytes=sum(cache_bytes(gguf, DEFAULT_CONTEXT, 1)))


async def answered(engine: GenerationEngine, prompt: list[int]) -> tuple[Completion, int]:
    """The answer, and how many tokens of its prompt were in a cache."""
    told = await listen(await engine.submit(of_tokens(prompt, max_tokens=8)))
    assert told.finish is not None
    return told, told.finish.usage.cached_tokens


async def test_an_edited_message_prefills_only_what_follows_the_one_before(split: Split) -> None:
    engine = await engine_of(split)
    await answered(engine, chat(SYSTEM, MESSAGE))

    for edited in (EDITED, MESSAGE[:9], [5]):
        prompt = chat(SYSTEM, edited)
        told, cached = await answered(engine, prompt)

        assert told.tokens == (await split.whole.alone(prompt, 8)).tokens
        assert cached == len(chat(SYSTEM)) - 2  # an end and a beginning are one place
    engine.close()
    await split.until_free()


async def test_a_turn_without_what_the_answer_reasoned(split: Split) -> None:
    engine = await engine_of(split)
    prompt = chat(SYSTEM, MESSAGE)
    first, _ = await answered(engine, prompt)
    turn = [*prompt, *first.tokens[4:], END, BEGIN, *EDITED, END, BEGIN]

    told, cached = await answered(engine, turn)

    assert told.tokens == (await split.whole.alone(turn, 8)).tokens
    assert cached == len(prompt) - 2
    engine.close()


async def test_a_cancelled_answer_s_prompt_is_edited(split: Split) -> None:
    engine = await engine_of(split)
    ticket = await engine.submit(of_tokens(chat(SYSTEM, MESSAGE), max_tokens=150))
    async for event in ticket:
        if event.delta.token_ids:
            ticket.cancel()
    prompt = chat(SYSTEM, EDITED)

    told, cached = await answered(engine, prompt)

    assert told.tokens == (await split.whole.alone(prompt, 8)).tokens
    assert cached == len(chat(SYSTEM)) - 2  # an end and a beginning are one place
    engine.close()


async def test_many_chats_at_once_leave_nothing(split: Split) -> None:
    """More checkpoints than llama.cpp keeps states: the others are on the host meanwhile."""
    engine = await engine_of(split, users=2)
    # As many as may wait: answers that have just ended may still count as running.
    prompts = [chat([*SYSTEM, n], MESSAGE) for n in range(4)]
    prompts += [chat([*SYSTEM, n], EDITED) for n in range(4)]
    wanted = [(await split.whole.alone(prompt, 8)).tokens for prompt in prompts]

    for _ in range(2):
        told = await asyncio.gather(*(answered(engine, prompt) for prompt in prompts))
        assert [each.tokens for each, _ in told] == wanted

    engine.close()
    await split.until_free()


async def test_a_prompt_that_fills_the_context_evicts_all_checkpoints(split: Split) -> None:
    engine = await engine_of(split)
    for number in range(4):
        long = chat([number + 1] * 100, MESSAGE, [number + 7] * 90)

        told, _ = await answered(engine, long)

        assert told.tokens == (await split.whole.alone(long, 8)).tokens
    engine.close()
