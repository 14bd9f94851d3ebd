"""Guessing ahead: never another text, whatever the caches, and fewer steps where guesses are right.

The model is cut over three processes. Its caches are of every sort; see tests/support/guessing.py.
"""

import asyncio
from pathlib import Path

import pytest

from node.speculation.drafting import Drafter, DraftModel, Lookup, Speculation
from tests.support.engines import THREAD, Split, Tiny, ask, listen, of_tokens
from tests.support.guessing import (
    KV_BYTES,
    MAX_TOKENS,
    PROMPTS,
    Oracle,
    configuration,
    guessed,
    hear,
    oracle_of,
    split,
    tokens_alone,
)
from tests.support.tiny import VOCAB, write_model
from unicluster.v1.chat_pb2 import Sampling

__all__ = ["split"]  # a fixture


def speculation(drafter: Drafter, most: int = 6) -> Speculation:
    return Speculation(lambda: drafter, most)


async def pupil(split: Split) -> Speculation:
    return speculation(await oracle_of(split))


async def test_the_text_is_the_same_for_several_users_at_once(split: Split) -> None:
    engine = await split.engine(users=2, speculation=await pupil(split))

    completions = await asyncio.gather(*(hear(engine, prompt) for prompt in PROMPTS))

    assert engine.scheduler is not None
    lanes = list(engine.scheduler.lanes)
    engine.close()
    assert [completion.tokens for completion in completions] == await tokens_alone(split)
    for drafted, accepted in map(guessed, completions):
        assert 0 < accepted < drafted
    assert sum(lane.steps for lane in lanes) < sum(lane.tokens for lane in lanes)
    await split.until_free()


async def test_a_seed_draws_the_same_text_as_without(split: Split) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2, seed=7)
    plain = await split.engine()
    alone = await hear(plain, PROMPTS[2], sampling=sampling, logprobs=2)
    plain.close()
    engine = await split.engine(
        speculation=speculation(Oracle([PROMPTS[2] + alone.tokens])), users=1
    )

    completion = await hear(engine, PROMPTS[2], sampling=sampling, logprobs=2)

    engine.close()
    assert completion.tokens == alone.tokens
    assert guessed(completion)[1] > 0
    for got, expected in zip(completion.logprobs, alone.logprobs, strict=True):
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert [top.token_id for top in got.top] == [top.token_id for top in expected.top]


async def test_an_answer_ends_where_it_would_without(split: Split) -> None:
    (answer,) = [(await split.whole.alone(PROMPTS[1], MAX_TOKENS)).tokens]
    engine = await split.engine(users=1, speculation=await pupil(split))

    lengths = [len(await ask(engine, PROMPTS[1], max_tokens=most)) for most in range(1, 9)]

    engine.close()
    assert lengths == list(range(1, min(9, len(answer) + 1)))


async def test_the_next_turn_prefills_only_what_is_new(split: Split) -> None:
    engine = await split.engine(users=1, kv_bytes=KV_BYTES, speculation=await pupil(split))
    first = await hear(engine, PROMPTS[3])
    turn = [*PROMPTS[3], *first.tokens, *PROMPTS[1]]

    second = await hear(engine, turn)

    engine.close()
    assert second.tokens == (await split.whole.alone(turn, MAX_TOKENS)).tokens
    assert second.finish is not None
    assert second.finish.usage.cached_tokens >= len(PROMPTS[3])


async def test_answers_given_up_in_the_middle_leave_nothing(split: Split) -> None:
    engine = await split.engine(users=2, speculation=await pupil(split))
    tickets = [await engine.submit(of_tokens(PROMPTS[i % 4])) for i in range(6)]
    for ticket in tickets[::2]:
        await anext(ticket)
        ticket.cancel()
    for ticket in tickets[1::2]:
        await listen(ticket)

    await split.until_free()
    engine.close()


async def test_a_model_is_its_own_best_draft(split: Split) -> None:
    draft = await THREAD.run(lambda: DraftModel(split.whole.model, VOCAB))
    engine = await split.engine(users=1, speculation=speculation(draft))

    completions = [await hear(engine, prompt) for prompt in PROMPTS]

    engine.close()
    assert [completion.tokens for completion in completions] == await tokens_alone(split)
    for drafted, accepted in map(guessed, completions):
        assert accepted == drafted > 0


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param("llama", marks=pytest.mark.sweep),
        pytest.param("gemma3", marks=pytest.mark.sweep),
        "lfm2",
    ],
)
async def test_a_draft_of_any_sort_changes_nothing(
    split: Split, tmp_path: Path, model_type: str
) -> None:
    other = await Tiny.load(write_model(tmp_path / "it", configuration(model_type), seed=1))
    draft = await THREAD.run(lambda: DraftModel(other.model, VOCAB))
    engine = await split.engine(users=1, speculation=speculation(draft))

    completions = [await hear(engine, prompt) for prompt in [*PROMPTS, *PROMPTS]]

    engine.close()
    assert [completion.tokens for completion in completions] == 2 * await tokens_alone(split)


async def test_what_repeats_itself_is_looked_up(split: Split) -> None:
    answer = (await split.whole.alone(PROMPTS[2], MAX_TOKENS)).tokens
    # The text says already how it goes on, as when a page is to be corrected.
    prompt = [*PROMPTS[2], *answer, *PROMPTS[2]]
    engine = await split.engine(users=1, speculation=Speculation(Lookup, 6))

    completion = await hear(engine, prompt)

    engine.close()
    assert completion.tokens == (await split.whole.alone(prompt, MAX_TOKENS)).tokens


# What is looked up


@pytest.mark.parametrize(
    ("tokens", "guesses"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1]),
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], [4, 9, 1, 2]),  # the latest
        ([8, 1, 2, 3, 9, 7, 1, 2, 4, 9, 8, 1, 2], [3, 9, 7, 1]),  # the longest
        ([5, 1, 2, 1, 2], [1, 2, 1, 2]),  # over its own end
        ([1, 2, 3, 4, 2], []),  # one token alone says little
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_lookup(tokens: list[int], guesses: list[int]) -> None:
    assert Lookup().propose(tokens, 4) == guesses


def test_lookup_follows_a_growing_text_and_forgets_the_last_one() -> None:
    lookup = Lookup()
    text = [1, 2, 3, 1]
    assert lookup.propose(text, 2) == []
    text.append(2)
    assert lookup.propose(text, 2) == [3, 1]

    assert lookup.propose([1, 2], 2) == []
