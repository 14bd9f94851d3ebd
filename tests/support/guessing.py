"""Models with caches of every sort over three processes, and drafters that know the answers."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from node.generation.engine import GenerationEngine
from tests.support import zoo
from tests.support.engines import Completion, Split, listen, of_tokens
from tests.support.tiny import ARCHITECTURES, EOS, VOCAB, tiny_config, write_model

# All of it can be cut back (llama), windows that are full can't (gemma3), states never (lfm2), and
# chunks don't batch either (llama4).
KINDS = ["llama", "gemma3", "lfm2", "llama4"]
PROMPTS = [[(7 * i * i + 3 * k) % 200 + 1 for i in range(20 * k + 3)] for k in range(4)]
MAX_TOKENS = 40
KV_BYTES = 50_000_000


def configuration(model_type: str) -> dict[str, Any]:
    if model_type in ARCHITECTURES:
        return tiny_config(model_type)
    config = zoo.config(model_type)
    for fields in (config, config["text_config"]):
        fields |= {"vocab_size": VOCAB, "eos_token_id": EOS, "torch_dtype": "float32"}
    return config


@pytest.fixture(scope="module", params=KINDS)
def split(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Split]:
    """A tiny model of each kind; a test module gets it by importing it."""
    folder = tmp_path_factory.mktemp("models")
    path = write_model(folder / request.param, configuration(request.param))
    split = asyncio.run(Split.open(path))
    with split.model:
        yield split


class Oracle:
    """Knows the texts, but for every `wrong`th token."""

    def __init__(self, texts: list[list[int]], wrong: int = 5) -> None:
        self._texts = texts
        self._wrong = wrong

    def propose(self, tokens: list[int], count: int, ahead: Sequence[int] = ()) -> list[int]:
        known = [text for text in self._texts if text[: len(tokens)] == tokens]
        start = len(tokens) + len(ahead)
        rest = known[0][start : start + count] if known else []
        places = enumerate(rest, start)
        return [t if at % self._wrong else (t + 1) % VOCAB for at, t in places]


async def tokens_alone(split: Split) -> list[list[int]]:
    """Answers to PROMPTS by mlx-lm alone."""
    return [(await split.whole.alone(p, MAX_TOKENS)).tokens for p in PROMPTS]


async def oracle_of(split: Split, wrong: int = 5) -> Oracle:
    """An oracle of the answers to PROMPTS."""
    answers = zip(PROMPTS, await tokens_alone(split), strict=True)
    return Oracle([prompt + answer for prompt, answer in answers], wrong)


async def hear(engine: GenerationEngine, prompt: list[int], **fields: Any) -> Completion:
    request = of_tokens(prompt, **({"max_tokens": MAX_TOKENS} | fields))
    return await listen(await engine.submit(request))


def guessed(completion: Completion) -> tuple[int, int]:
    """Tokens that were drafted for an answer, and how many of them were accepted."""
    assert completion.finish is not None
    return completion.finish.usage.drafted_tokens, completion.finish.usage.accepted_tokens
