"""Guesses that follow one another through the pipe: never another text, whatever the caches.

The model is cut over three processes. Its caches are of every sort; see tests/support/guessing.py.
"""

import asyncio
import itertools
from typing import Any

import pytest

from node.generation.batch import BatchDecoder
from node.generation.engine import GenerationEngine
from node.generation.piped import PipedDecoder
from node.generation.scheduler import Scheduler
from node.speculation.depth import PipeTimes
from node.speculation.drafting import DraftModel, Lookup, Speculation
from node.speculation.gate import PipedTimes
from node.speculation.pace import Pace
from tests.support.constrained import point_of
from tests.support.engines import THREAD, Split, ask, listen, of_tokens
from tests.support.guessing import (
    KV_BYTES,
    MAX_TOKENS,
    PROMPTS,
    Oracle,
    guessed,
    hear,
    oracle_of,
    split,
    tokens_alone,
)
from tests.support.tiny import VOCAB
from unicluster.v1.chat_pb2 import Sampling

__all__ = ["split"]  # a fixture


@pytest.fixture(autouse=True)
def _always_guessing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether guessing pays, and how deep, is measured; here it doesn't depend on the machine."""
    monkeypatch.setattr(PipedTimes, "weigh", lambda _: None)
    monkeypatch.setattr(PipeTimes, "depth", lambda _: 3)


def piped(drafter: Any) -> Speculation:
    return Speculation(lambda: drafter, 8, piped=True)


async def oracle(split: Split, wrong: int = 5) -> Speculation:
    return piped(await oracle_of(split, wrong))


async def piping(split: Split, speculation: Speculation, **options: Any) -> GenerationEngine:
    """An engine whose lanes decode so."""
    engine = await split.engine(speculation=speculation, **({"users": 1} | options))
    assert engine.scheduler is not None
    assert all(isinstance(lane._decoder, PipedDecoder) for lane in engine.scheduler.lanes)
    return engine


@pytest.mark.parametrize(
    "wrong",
    [pytest.param(2, marks=pytest.mark.sweep), 5, pytest.param(1000, marks=pytest.mark.sweep)],
)
async def test_the_text_is_that_of_plain_decode(split: Split, wrong: int) -> None:
    engine = await piping(split, await oracle(split, wrong))

    completions = [await hear(engine, prompt) for prompt in PROMPTS]

    engine.close()
    assert [completion.tokens for completion in completions] == await tokens_alone(split)
    for drafted, accepted in map(guessed, completions):
        assert 0 < accepted <= drafted
    await split.until_free()


async def test_by_default_no_copies_are_made(split: Split) -> None:
    """Full windows are rolled back by what was overwritten; states would have to be copied."""
    texts = (await oracle_of(split))._texts
    prompt, expected = PROMPTS[3], (await tokens_alone(split))[3]
    engine = await piping(split, Speculation(lambda: Oracle(texts), 8, piped=True, auto=True))

    completion = await hear(engine, prompt)

    engine.close()
    assert completion.tokens == expected
    assert (guessed(completion)[0] > 0) == (split.name in ("llama", "gemma3"))
    await split.until_free()


async def test_several_tokens_a_frame(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    if split.name != "llama":
        pytest.skip("caches that need snapshots have one token a frame")
    widths = itertools.cycle([3, 1, 4, 2])
    monkeypatch.setattr(Pace, "width", lambda *_: next(widths))
    sampling = Sampling(temperature=0.9, repetition_penalty=1.2, seed=7)
    plain = await split.engine()
    drawn = [await hear(plain, prompt, sampling=sampling) for prompt in PROMPTS]
    plain.close()
    texts = [prompt + one.tokens for prompt, one in zip(PROMPTS, drawn, strict=True)]
    engine = await piping(split, await oracle(split))
    seeded = await piping(split, piped(Oracle(texts)))

    completions = [await hear(engine, prompt) for prompt in PROMPTS]
    completions += [await hear(seeded, prompt, sampling=sampling) for prompt in PROMPTS]

    engine.close()
    seeded.close()
    expected = [*(await tokens_alone(split)), *(one.tokens for one in drawn)]
    assert [completion.tokens for completion in completions] == expected
    for drafted, accepted in map(guessed, completions):
        assert 0 < accepted < drafted
    await split.until_free()


async def test_several_users_at_once(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    # More than their part, so that the guesses of one are in the way of the other's tokens.
    monkeypatch.setattr(Scheduler, "_share", lambda _scheduler, frames: frames)
    engine = await piping(split, await oracle(split), users=2)

    completions = await asyncio.gather(*(hear(engine, prompt) for prompt in PROMPTS))

    engine.close()
    assert [completion.tokens for completion in completions] == await tokens_alone(split)
    await split.until_free()


async def test_a_seed_draws_the_same_text_and_logprobs(split: Split) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2, seed=7)
    plain = await split.engine()
    alone = await hear(plain, PROMPTS[2], sampling=sampling, logprobs=2)
    plain.close()
    engine = await piping(split, piped(Oracle([PROMPTS[2] + alone.tokens])))

    completion = await hear(engine, PROMPTS[2], sampling=sampling, logprobs=2)

    engine.close()
    assert completion.tokens == alone.tokens
    assert 0 < guessed(completion)[1] < guessed(completion)[0]
    for got, expected in zip(completion.logprobs, alone.logprobs, strict=True):
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert [top.token_id for top in got.top] == [top.token_id for top in expected.top]


async def test_stop_strings_and_lengths_end_it_where_they_would_without(split: Split) -> None:
    plain = await split.engine()
    whole = await hear(plain, PROMPTS[1])
    stop = [whole.text[4:6]]
    stopped = await hear(plain, PROMPTS[1], stop=stop)
    plain.close()
    engine = await piping(split, await oracle(split, 1000))

    again = await hear(engine, PROMPTS[1], stop=stop)
    lengths = [len(await ask(engine, PROMPTS[1], max_tokens=most)) for most in range(1, 7)]

    engine.close()
    assert (again.text, again.reason) == (stopped.text, stopped.reason)
    assert lengths == list(range(1, min(7, len(whole.tokens) + 1)))


async def test_the_next_turn_prefills_only_what_is_new(split: Split) -> None:
    engine = await piping(split, await oracle(split, 1000), kv_bytes=KV_BYTES)
    first = await hear(engine, PROMPTS[3])
    turn = [*PROMPTS[3], *first.tokens, *PROMPTS[1]]

    second = await hear(engine, turn)

    engine.close()
    assert second.tokens == (await split.whole.alone(turn, MAX_TOKENS)).tokens
    assert second.finish is not None
    assert second.finish.usage.cached_tokens >= len(PROMPTS[3])


@pytest.mark.sweep
async def test_answers_given_up_in_the_middle_leave_nothing(split: Split) -> None:
    engine = await piping(split, await oracle(split), users=2)
    tickets = [await engine.submit(of_tokens(PROMPTS[i % 4])) for i in range(6)]
    for ticket in tickets[::2]:
        await anext(ticket)
        ticket.cancel()
    for ticket in tickets[1::2]:
        await listen(ticket)

    await split.until_free()
    engine.close()


@pytest.mark.sweep
async def test_a_model_drafts_for_itself(split: Split) -> None:
    draft = await THREAD.run(lambda: DraftModel(split.whole.model, VOCAB))
    engine = await piping(split, piped(draft))

    completions = [await hear(engine, prompt) for prompt in PROMPTS]

    engine.close()
    assert [completion.tokens for completion in completions] == await tokens_alone(split)


async def test_guesses_that_a_grammar_forbids_are_not_sent(split: Split) -> None:
    if split.name != "llama":
        pytest.skip("caches have no part in it")
    request = point_of(PROMPTS[2])
    plain = await split.engine(context=512, users=1)
    alone = await listen(await plain.submit(request))
    plain.close()
    # Every third guess would break the grammar.
    engine = await piping(split, piped(Oracle([PROMPTS[2] + alone.tokens], wrong=3)), context=512)

    completion = await listen(await engine.submit(request))

    engine.close()
    assert completion.tokens == alone.tokens
    drafted, accepted = guessed(completion)
    assert 0 < accepted <= drafted


@pytest.mark.sweep
async def test_a_trace_says_which_trips_are_guesses(split: Split) -> None:
    engine = await piping(split, await oracle(split))
    ticket = await engine.submit(of_tokens(PROMPTS[2], max_tokens=MAX_TOKENS, trace=True))

    completion = await listen(ticket)

    engine.close()
    assert completion.finish is not None
    spans = [span for span in completion.finish.trace.spans if span.name == "layers" and span.trip]
    guesses = {span.trip for span in spans if span.guess}
    assert 0 < len(guesses) < len({span.trip for span in spans})
    assert {span.trip for span in spans if span.skipped} <= guesses


@pytest.mark.sweep
async def test_lookup(split: Split) -> None:
    answer = (await split.whole.alone(PROMPTS[2], MAX_TOKENS)).tokens
    prompt = [*PROMPTS[2], *answer, *PROMPTS[2]]
    engine = await piping(split, Speculation(Lookup, 8, piped=True))

    completion = await hear(engine, prompt)

    engine.close()
    assert completion.tokens == (await split.whole.alone(prompt, MAX_TOKENS)).tokens


async def test_answers_move_between_decoders(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    if split.name == "llama4":
        pytest.skip("its answers don't batch, so that each has a lane of its own")
    moves: list[type] = []
    for decoder in (BatchDecoder, PipedDecoder):
        monkeypatch.setattr(decoder, "hand_over", _noted(decoder.hand_over, decoder, moves))
    sampling = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2, seed=7)
    # The one with the shortest prompt begins alone, has most to say, and is left alone.
    lengths = [150, 12, 12, 12]
    requests = [
        of_tokens(prompt, max_tokens=most, sampling=sampling, logprobs=2, ignore_eos=True)
        for prompt, most in zip(PROMPTS, lengths, strict=True)
    ]
    plain = await split.engine(lanes=1)
    alone = [await listen(await plain.submit(request)) for request in requests]
    plain.close()
    texts = [prompt + one.tokens for prompt, one in zip(PROMPTS, alone, strict=True)]
    engine = await split.engine(speculation=piped(Oracle(texts)), users=4, lanes=1)

    tickets = [await engine.submit(request) for request in requests]
    completions = await asyncio.gather(*map(listen, tickets))

    engine.close()
    assert set(moves) == {BatchDecoder, PipedDecoder}
    for completion, expected in zip(completions, alone, strict=True):
        assert completion.tokens == expected.tokens
        for got, other in zip(completion.logprobs, expected.logprobs, strict=True):
            assert got.logprob == pytest.approx(other.logprob, abs=1e-3)
    assert sum(guessed(completion)[1] for completion in completions) > 0
    await split.until_free()


def _noted(hand_over: Any, decoder: type, moves: list[type]) -> Any:
    def noted(self: Any, sequence: Any) -> Any:
        moves.append(decoder)
        return hand_over(self, sequence)

    return noted
