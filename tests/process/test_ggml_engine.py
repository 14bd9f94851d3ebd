"""The engine over stages of ggml: lanes, prompt reuse and guessing, as over those of MLX."""

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

import unicluster
from node.constraints import mask
from node.generation.answer import Answer
from node.generation.batch import BatchDecoder
from node.generation.request import Job
from node.generation.sampling import Sampling
from node.generation.sequence import Sequence
from node.pipeline.pipeline_model import PipelineModel
from node.speculation.depth import PipeTimes
from node.speculation.drafting import Lookup, Speculation
from node.speculation.gate import PipedTimes
from tests.support.constrained import POINT, point_of
from tests.support.engines import THREAD, Split, Tiny, ask, listen, of_tokens
from tests.support.guessing import Oracle, guessed
from tests.support.tiny_gguf import write_gguf
from unicluster.v1.chat_pb2 import GenerateRequest
from unicluster.v1.chat_pb2 import Sampling as WireSampling

PROMPTS = [[(7 * i * i + 3 * k) % 200 + 1 for i in range(20 * k + 3)] for k in range(6)]
KV_BYTES = 50_000_000
SEEDED = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 7}


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen3next"])
def split(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Split]:
    """Over as many processes as it can be cut for; qwen3next needs both its kinds in each."""
    layers = 8 if request.param == "qwen3next" else 6
    folder = tmp_path_factory.mktemp("models")
    file = str(write_gguf(folder / f"{request.param}.gguf", request.param, layers))
    stages = 2 if request.param == "qwen3next" else 3

    async def load() -> Split:
        whole = Tiny(*await THREAD.run(lambda: unicluster.load(file, local_nodes=1)))
        cut = await THREAD.run(lambda: unicluster.load(file, local_nodes=stages))
        return Split(*cut, whole, request.param)

    split = asyncio.run(load())
    with split.model, split.whole.model:
        yield split


@pytest.mark.parametrize("lanes", [1, 2, None])
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

    await split.until_free()
    engine.close()


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

    told = await listen(await engine.submit(of_tokens(prompt)))

    engine.close()
    assert told.tokens == (await split.whole.alone(prompt)).tokens
    assert told.finish is not None
    trimmable = split.name != "qwen3next"
    assert told.finish.usage.cached_tokens == (80 if trimmable else 0)


@pytest.mark.parametrize("piped", [False, True], ids=["", "piped"])
async def test_guesses_change_nothing(split: Split, piped: bool) -> None:
    answer = (await split.whole.alone(PROMPTS[2], 40)).tokens
    # The text says already how it goes on, as when a page is to be corrected.
    prompt = [*PROMPTS[2], *answer, *PROMPTS[2]]
    # Two answers fill this pipe with their own tokens.
    users = 1 if piped else 2
    engine = await split.engine(users=users, speculation=Speculation(Lookup, 6, piped=piped))

    tickets = [await engine.submit(of_tokens(p, max_tokens=40)) for p in (prompt, PROMPTS[3])]
    told = [await listen(ticket) for ticket in tickets]

    engine.close()
    for each, asked in zip(told, (prompt, PROMPTS[3]), strict=True):
        assert each.tokens == (await split.whole.alone(asked, 40)).tokens
    assert told[0].finish is not None
    # Where the head is the slowest stage by far, as it is here, the pipe has no room for guesses.
    assert piped or told[0].finish.usage.drafted_tokens > 0
    await split.until_free()


@pytest.mark.parametrize(
    "sampling",
    [pytest.param({}, marks=pytest.mark.sweep, id="greedy"), pytest.param(SEEDED, id="seeded")],
)
async def test_guesses_fill_the_pipe(
    split: Split, sampling: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PipedTimes, "weigh", lambda _: None)
    monkeypatch.setattr(PipeTimes, "depth", lambda _: 3)
    fields: dict[str, Any] = {"max_tokens": 40, "sampling": WireSampling(**sampling), "logprobs": 2}
    plain = await split.engine(users=1)
    alone = [await listen(await plain.submit(of_tokens(p, **fields))) for p in PROMPTS[:4]]
    plain.close()
    texts = [prompt + one.tokens for prompt, one in zip(PROMPTS, alone, strict=False)]
    stop = alone[1].text[8:11]
    engine = await split.engine(
        users=2, speculation=Speculation(lambda: Oracle(texts), 8, piped=True)
    )

    told = [await listen(await engine.submit(of_tokens(p, **fields))) for p in PROMPTS[:4]]
    stopped = await listen(await engine.submit(of_tokens(PROMPTS[1], **fields, stop=[stop])))
    tickets = [await engine.submit(of_tokens(p, **fields)) for p in PROMPTS[:4]]
    together = await asyncio.gather(*map(listen, tickets))

    engine.close()
    for got in (told, together):
        for one, expected in zip(got, alone, strict=True):
            assert one.tokens == expected.tokens
            for mine, other in zip(one.logprobs, expected.logprobs, strict=True):
                assert mine.logprob == pytest.approx(other.logprob, abs=1e-3)
    assert stopped.text == alone[1].text[: alone[1].text.index(stop)]
    # llama.cpp has no room for the states of several guesses.
    assert all((guessed(one)[1] > 0) == (split.name != "qwen3next") for one in told)
    await split.until_free()


# Tokens that the last stage chooses

# Each group decodes together; a model with states has few to spare.
GROUPS: list[list[dict[str, Any]]] = [
    [{"temperature": 0.0}, {"temperature": 0.9, "seed": 1}, {"temperature": 1.2, "min_p": 0.1}],
    [{"temperature": 0.8, "top_p": 0.9, "seed": 2}, {"temperature": 1.5, "top_k": 5, "seed": 3}],
    [{"temperature": 0.9, "repetition_penalty": 1.3, "seed": 5}, {"logit_bias": {7: 3.0}}, {}],
]


def decoded(model: Any, group: list[dict[str, Any]]) -> list[list[int]]:
    """20 tokens of each answer of one batch; the first leaves it early. Log probabilities are
    wanted of the last."""
    decoder, tokens = BatchDecoder(model), {}
    for number, sampling in enumerate(group):
        job = Job(
            PROMPTS[number + 1],
            max_tokens=50,
            sampling=Sampling(**{"seed": 7} | sampling),
            stop=(),
            logprobs=2 if number == 2 else None,
            marks=None,
        )
        ticket: Any = SimpleNamespace(job=job)
        sequence = Sequence(ticket, Answer.__new__(Answer), cache=make_prompt_cache(model))
        model(mx.array([sequence.prompt[:-1]]), cache=sequence.cache)
        sequence.cached = len(sequence.prompt) - 1
        decoder.add(sequence)
        tokens[sequence] = list[int]()
    first, *others = tokens
    left = False
    while min(len(tokens[sequence]) for sequence in others) < 20:
        for sequence, token, logprobs in decoder.step():
            assert sequence.job.logprobs is None or logprobs.size == model.vocabulary
            tokens[sequence].append(token)
        if not left and len(tokens[first]) == 5:
            left = True
            decoder.remove(first)
    for sequence in others:
        decoder.remove(sequence)
    decoder.close()
    return [found[:20] for found in tokens.values()]


@pytest.mark.parametrize("group", GROUPS, ids=["all", "bounds", "processors"])
async def test_it_does_not_matter_where_tokens_are_chosen(
    split: Split, group: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = await THREAD.run(lambda: decoded(split.model, group))

    monkeypatch.setattr(PipelineModel, "chooses", False)

    assert elsewhere == await THREAD.run(lambda: decoded(split.model, group))
    await split.until_free()


async def test_logits_that_nobody_reads_do_not_come_back(split: Split) -> None:
    back = split.model.trips.hops[-1]
    engine = await split.engine(users=1)
    before = back.bytes

    await ask(engine, PROMPTS[2], max_tokens=40, ignore_eos=True)

    engine.close()
    # Of the answer's first token they do; and two tokens may be too close to tell elsewhere.
    assert back.bytes - before <= 3 * 4 * split.model.vocabulary


# Constrained answers


MASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9, "seed": 3},
    {"temperature": 1.0, "top_k": 40, "min_p": 0.01, "seed": 4},
]


@pytest.mark.parametrize(
    ("users", "speculation"),
    [(3, None), (1, Speculation(Lookup, 6, piped=True))],
    ids=["", "piped"],
)
async def test_it_does_not_matter_where_constrained_tokens_are_chosen(
    split: Split, users: int, speculation: Speculation | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask, "QUICK_S", float("inf"))  # however slow this machine is
    back = split.model.trips.hops[-1]

    async def answers() -> tuple[list[list[int]], int]:
        """Tokens of each answer, and bytes that came back of the stages."""
        engine = await split.engine(users=users, context=512, speculation=speculation)
        before = back.bytes
        places = asyncio.Semaphore(users)

        async def answer(sampling: dict[str, Any]) -> list[int]:
            request = point_of(PROMPTS[2])
            request.max_tokens = 60
            request.sampling.CopyFrom(WireSampling(**sampling))
            async with places:
                return (await listen(await engine.submit(request))).tokens

        tokens = await asyncio.gather(*map(answer, MASKED))
        engine.close()
        return tokens, back.bytes - before

    there, fewer = await answers()
    monkeypatch.setattr(PipelineModel, "chooses", False)
    here, more = await answers()

    assert there == here
    if speculation is None:  # else tokens behind guesses are chosen here, and guesses differ
        assert fewer < more / 2
    await split.until_free()


@pytest.mark.parametrize(
    "speculation",
    [None, Speculation(Lookup, 6), Speculation(Lookup, 6, piped=True)],
    ids=["", "lookup", "piped"],
)
async def test_constrained_answers_beside_free_ones(
    split: Split, speculation: Speculation | None
) -> None:
    engine = await split.engine(users=4, context=512, speculation=speculation)

    free, *constrained = await asyncio.gather(
        ask(engine, PROMPTS[1]),
        *[listen(await engine.submit(point_of(prompt))) for prompt in PROMPTS[2:4]],
    )

    engine.close()
    assert free == (await split.whole.alone(PROMPTS[1])).tokens
    for completion in constrained:
        jsonschema.validate(json.loads(completion.text), POINT)
