"""Several lanes over real stages: the engine's answers, whoever else is being served."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import unicluster
from node.engine import Engine
from tests.engines import THREAD, Tiny, listen, until
from tests.tiny import tiny_config, write_model
from unicluster.v1.chat_pb2 import GenerateRequest

PROMPTS = [[(7 * i * i + 3 * k) % 200 + 1 for i in range(20 * k + 3)] for k in range(6)]


@dataclass
class Split(Tiny):
    """A tiny model over three processes; `whole` is the same in one piece."""

    whole: Tiny

    @classmethod
    async def open(cls, path: Path) -> "Split":
        whole = await Tiny.load(path)
        return cls(*await THREAD.run(lambda: unicluster.load(str(path), local_nodes=3)), whole)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def split(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Split]:
    path = write_model(tmp_path_factory.mktemp(request.param), tiny_config(request.param))
    split = asyncio.run(Split.open(path))
    with split.model:
        yield split


async def ask(engine: Engine, prompt: list[int], **fields: Any) -> list[int]:
    request = GenerateRequest(token_ids=prompt, **({"max_tokens": 24} | fields))
    return (await listen(await engine.submit(request))).tokens


@pytest.mark.parametrize("lanes", [None, 1, 2, 4])
async def test_answers_are_those_of_one_alone(split: Split, lanes: int | None) -> None:
    engine = await split.engine(users=4, lanes=lanes)

    told = await asyncio.gather(*(ask(engine, prompt) for prompt in PROMPTS))

    engine.close()
    assert told == [(await split.whole.alone(prompt)).tokens for prompt in PROMPTS]


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

    async with asyncio.timeout(10):
        while await THREAD.run(split.model.live_caches):
            await until(lambda: True)
    engine.close()
