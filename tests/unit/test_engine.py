import asyncio
import copy
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.tokenizer_utils import TokenizerWrapper

from node.generation.config import GenerationConfig
from node.generation.engine import GenerationEngine
from node.generation.ticket import Ticket
from tests.support import zoo
from tests.support.deadlines import scaled
from tests.support.engines import (
    THREAD,
    Completion,
    Fragile,
    Script,
    Tiny,
    listen,
    live_caches,
    until,
)
from tests.support.tiny import ARCHITECTURES, EOS, tiny_config, write_model
from unicluster.errors import (
    BusyError,
    InputError,
    NotFoundError,
    StageError,
    UnavailableError,
    UniclusterError,
)
from unicluster.v1.chat_pb2 import GenerateRequest, Message, Sampling
from unicluster.v1.node_pb2 import StageSpec

Load = Callable[..., Awaitable[Tiny]]


async def ask(engine: GenerationEngine, request: GenerateRequest) -> Completion:
    return await listen(await engine.submit(request))


def of_tokens(tokens: list[int], **fields: Any) -> GenerateRequest:
    return GenerateRequest(token_ids=tokens, **({"max_tokens": 24} | fields))


PROMPTS = [list(range(60, 63)), list(range(90)), [200] * 7, list(range(150, 190))]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    loaded: dict[Any, Tiny] = {}

    async def load(model_type: str = "llama", *, marks: bool = False) -> Tiny:
        if (model_type, marks) not in loaded:
            path = tmp_path_factory.mktemp(model_type)
            write_model(path, tiny_config(model_type), marks=marks)
            loaded[model_type, marks] = await Tiny.load(path)
        return loaded[model_type, marks]

    return load


@pytest.fixture
async def tiny(load: Load) -> Tiny:
    return await load()


@pytest.fixture
async def engine(tiny: Tiny) -> AsyncIterator[GenerationEngine]:
    engine = await tiny.engine()
    yield engine
    engine.close()


# Tokens


@pytest.mark.parametrize("model_type", ARCHITECTURES)
async def test_answers_side_by_side_are_those_of_mlx_lm_one_by_one(
    model_type: str, load: Load
) -> None:
    tiny = await load(model_type)
    engine = await tiny.engine()
    received = await asyncio.gather(*(ask(engine, of_tokens(prompt)) for prompt in PROMPTS))
    engine.close()
    alone = [await tiny.alone(prompt) for prompt in PROMPTS]
    assert [(t.tokens, t.text) for t in received] == [(a.tokens, a.text) for a in alone]


@pytest.mark.parametrize("name", ["llama4", "deepseek_v41: shared index"])
async def test_answers_of_caches_that_do_not_batch_have_a_lane_each(name: str, tiny: Tiny) -> None:
    odd = Tiny(await THREAD.run(lambda: zoo.build(name)), tiny.tokenizer)
    prompts = [prompt[:30] for prompt in PROMPTS if max(prompt) < zoo.VOCAB]
    engine = await odd.engine(users=2)
    received = await asyncio.gather(*(ask(engine, of_tokens(prompt)) for prompt in prompts))
    engine.close()
    assert [t.tokens for t in received] == [(await odd.alone(prompt)).tokens for prompt in prompts]


def penalties_of_mlx_lm(prompt: list[int], **penalties: float) -> list[Any]:
    """mlx-lm's own; presence and frequency see all of the answer, and nothing of the prompt."""

    def of_answer(penalty: Any) -> Any:
        return lambda tokens, logits: penalty(tokens[len(prompt) :], logits)

    repetition = {name: penalties.pop(name) for name in ["repetition_penalty"] if name in penalties}
    wide = {f"{name.partition('_')[0]}_context_size": 1000 for name in penalties}
    others = make_logits_processors(**penalties, **wide) if penalties else []
    return [*make_logits_processors(**repetition), *map(of_answer, others)]


async def test_penalties_see_the_whole_answer_and_no_prompt(tiny: Tiny) -> None:
    """Alone and in a batch, past any window: this model would repeat itself without."""
    engine = await tiny.engine(users=2)
    prompts = [PROMPTS[2], PROMPTS[3]]
    asks = [
        of_tokens(prompt, max_tokens=60, sampling=Sampling(presence_penalty=2, frequency_penalty=1))
        for prompt in prompts
    ]
    alone = [(await ask(engine, each)).tokens for each in asks]
    together = [each.tokens for each in await asyncio.gather(*(ask(engine, each) for each in asks))]
    engine.close()

    penalties = {"presence_penalty": 2.0, "frequency_penalty": 1.0}
    for prompt, tokens in zip(prompts, alone, strict=True):
        processors = penalties_of_mlx_lm(prompt, **penalties)
        wanted = await tiny.alone(prompt, max_tokens=60, logits_processors=processors)
        narrow = make_logits_processors(**penalties)
        other = await tiny.alone(prompt, max_tokens=60, logits_processors=narrow)
        assert tokens == wanted.tokens != other.tokens
    assert together == alone


async def test_penalties_hold_where_nothing_batches(tiny: Tiny) -> None:
    odd = Tiny(await THREAD.run(lambda: zoo.build("llama4")), tiny.tokenizer)
    engine = await odd.engine()
    penalties = Sampling(repetition_penalty=1.5, presence_penalty=1.0)
    received = await ask(engine, of_tokens(PROMPTS[0], sampling=penalties))
    engine.close()
    processors = penalties_of_mlx_lm(PROMPTS[0], repetition_penalty=1.5, presence_penalty=1.0)
    assert received.tokens == (await odd.alone(PROMPTS[0], logits_processors=processors)).tokens


async def test_requests_join_and_leave_midway(engine: GenerationEngine, tiny: Tiny) -> None:
    first = await engine.submit(of_tokens(PROMPTS[0], max_tokens=60))
    begun = [await anext(first) for _ in range(5)]
    second = asyncio.create_task(ask(engine, of_tokens(PROMPTS[1], max_tokens=5)))
    third = await engine.submit(of_tokens(PROMPTS[2]))
    await anext(third)
    third.cancel()
    rest = await listen(first)
    tokens = [*(t for event in begun for t in event.delta.token_ids), *rest.tokens]
    assert tokens == (await tiny.alone(PROMPTS[0], max_tokens=60)).tokens
    assert (await second).tokens == (await tiny.alone(PROMPTS[1], max_tokens=5)).tokens


async def test_more_requests_than_users_all_get_their_answer(tiny: Tiny) -> None:
    engine = await tiny.engine(users=2)
    received = await asyncio.gather(*(ask(engine, of_tokens(p)) for p in PROMPTS * 2))
    engine.close()
    assert [t.tokens for t in received] == [(await tiny.alone(p)).tokens for p in PROMPTS * 2]


async def test_an_end_token_ends_nothing_where_it_is_ignored(tiny: Tiny) -> None:
    engine = await tiny.engine(Script([65]))

    received = await ask(engine, of_tokens([1], max_tokens=5, ignore_eos=True))

    engine.close()
    assert (received.tokens, received.reason) == ([65, EOS, EOS, EOS, EOS], "length")


async def test_messages_go_through_the_chat_template(engine: GenerationEngine, tiny: Tiny) -> None:
    received = await ask(engine, GenerateRequest(messages=[hello()], max_tokens=8))
    prompt = tiny.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True
    )
    assert received.tokens == (await tiny.alone(prompt, max_tokens=8)).tokens


async def test_without_max_tokens_an_answer_fills_the_context(tiny: Tiny) -> None:
    engine = await tiny.engine(context=30)
    request = GenerateRequest(token_ids=PROMPTS[0])
    received = await ask(engine, request)
    engine.close()
    assert (len(received.tokens), received.reason) == (27, "length")


async def test_the_last_message_counts_tokens_and_time(engine: GenerationEngine) -> None:
    finish = (await ask(engine, of_tokens(PROMPTS[0], max_tokens=9))).finish
    assert finish is not None
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (3, 9)
    times = finish.timings
    assert 0 < times.queue_s < times.time_to_first_token_s
    assert times.tokens_per_s == pytest.approx(8 / times.decode_s)


# Sampling


def sampling(**fields: Any) -> Sampling:
    return Sampling(**({"temperature": 1.0} | fields))


async def test_a_seed_gives_the_same_answer_whoever_else_is_served(
    engine: GenerationEngine,
) -> None:
    request = of_tokens(PROMPTS[0], sampling=sampling(seed=5, top_p=0.9, top_k=50, min_p=0.01))
    alone = await ask(engine, request)
    among, *_ = await asyncio.gather(
        ask(engine, request),
        ask(engine, of_tokens(PROMPTS[1], sampling=sampling(seed=9))),
        ask(engine, of_tokens(PROMPTS[2], sampling=sampling())),
        ask(engine, of_tokens(PROMPTS[3])),
    )
    assert among.tokens == alone.tokens


async def test_other_seeds_and_no_seed_give_other_answers(engine: GenerationEngine) -> None:
    requests = [of_tokens(PROMPTS[0], sampling=sampling(seed=seed)) for seed in (1, 2)]
    requests += [of_tokens(PROMPTS[0], sampling=sampling()) for _ in range(2)]
    received = await asyncio.gather(*(ask(engine, request) for request in requests))
    assert len({tuple(t.tokens) for t in received}) == 4


async def test_a_model_s_own_defaults_hold_until_a_request_says_otherwise(tiny: Tiny) -> None:
    defaults = {"do_sample": True, "temperature": 2.0, "top_p": 1.0}
    engine = await tiny.engine(defaults=defaults)
    greedy = (await tiny.alone(PROMPTS[0])).tokens
    received = await ask(engine, of_tokens(PROMPTS[0]))
    cold = await ask(engine, of_tokens(PROMPTS[0], sampling=Sampling(temperature=0)))
    engine.close()
    assert received.tokens != greedy
    assert cold.tokens == greedy


async def test_more_likely_tokens_than_there_are_means_all(engine: GenerationEngine) -> None:
    wide = await ask(engine, of_tokens(PROMPTS[0], sampling=sampling(seed=1, top_k=10**6)))
    free = await ask(engine, of_tokens(PROMPTS[0], sampling=sampling(seed=1)))
    assert wide.tokens == free.tokens


async def test_penalties_are_those_of_mlx_lm(engine: GenerationEngine, tiny: Tiny) -> None:
    penalties: dict[str, Any] = {
        "repetition_penalty": 1.5,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
    }
    received, _ = await asyncio.gather(
        ask(engine, of_tokens(PROMPTS[2], sampling=Sampling(**penalties))),
        ask(engine, of_tokens(PROMPTS[0])),
    )
    processors = penalties_of_mlx_lm(PROMPTS[2], **penalties)
    alone = await tiny.alone(PROMPTS[2], logits_processors=processors)
    assert received.tokens == alone.tokens != (await tiny.alone(PROMPTS[2])).tokens


async def test_logprobs_of_the_chosen_and_the_most_likely(
    engine: GenerationEngine, tiny: Tiny
) -> None:
    received = await ask(engine, of_tokens(PROMPTS[0], logprobs=3, max_tokens=6))
    alone = await tiny.alone(PROMPTS[0], max_tokens=6)
    assert [entry.token_id for entry in received.logprobs] == received.tokens
    assert [entry.logprob for entry in received.logprobs] == pytest.approx(alone.logprobs, abs=1e-4)
    for entry in received.logprobs:
        top = [likely.logprob for likely in entry.top]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert entry.top[0].token_id == entry.token_id  # greedy


async def test_zero_logprobs_are_those_of_the_chosen_only(engine: GenerationEngine) -> None:
    received = await ask(engine, of_tokens(PROMPTS[0], logprobs=0, max_tokens=2))
    assert [(entry.token_id, len(entry.top)) for entry in received.logprobs] == [
        (received.tokens[0], 0),
        (received.tokens[1], 0),
    ]


# Bad requests


def hello(role: str = "user", content: str = "hello") -> Message:
    return Message(role=role, content=content)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages: there are none"),
    ({"messages": [hello()], "token_ids": [1]}, "messages: give either"),
    ({"messages": [hello("robot")]}, "messages: the role of message 1 must be one of system"),
    ({"messages": [hello(content=" ")]}, "messages: the prompt is empty"),
    ({"token_ids": [1] * 256}, "token_ids: the prompt has 256 tokens and the context is 256"),
    ({"messages": [hello(content="x" * 300)]}, "messages: the prompt has 3"),
    ({"token_ids": [5, 264]}, "token_ids: 264 is not in the vocabulary of 264"),
    ({"token_ids": [1], "max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
    ({"token_ids": [1] * 6, "max_tokens": 251}, "max_tokens: the context has room for 250"),
    ({"token_ids": [1], "stop": ["a", ""]}, "stop: must not contain an empty"),
    ({"token_ids": [1], "logprobs": 21}, "logprobs: must be at most 20, got 21"),
]
BAD_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 7}, "temperature: must be between 0 and 2, got 7"),
    ({"temperature": float("nan")}, "temperature: must be between 0 and 2, got nan"),
    ({"top_p": 0}, "top_p: must be above 0 and at most 1, got 0"),
    ({"top_p": 1.5}, "top_p: "),
    ({"min_p": -0.1}, "min_p: must be between 0 and 1, got -0.1"),
    ({"repetition_penalty": 0}, "repetition_penalty: must be above 0 and at most 10"),
    ({"presence_penalty": 3}, "presence_penalty: must be between -2 and 2"),
    ({"frequency_penalty": -3}, "frequency_penalty: must be between -2 and 2"),
]
BAD += [({"token_ids": [1], "sampling": Sampling(**s)}, message) for s, message in BAD_SAMPLING]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message for _, message in BAD])
async def test_a_bad_request_is_refused_by_field(
    engine: GenerationEngine, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        await engine.submit(GenerateRequest(**fields))
    assert str(caught.value).startswith(message)


async def test_what_the_chat_template_refuses_is_the_asker_s_fault(tiny: Tiny) -> None:
    strict = copy.copy(tiny.tokenizer._tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    engine = await Tiny(tiny.model, TokenizerWrapper(strict)).engine()
    with pytest.raises(InputError, match=r"messages: .*refuses them: roles must alternate"):
        await engine.submit(GenerateRequest(messages=[hello()]))
    engine.close()


async def test_a_model_without_chat_template_takes_only_tokens(tiny: Tiny) -> None:
    plain = copy.copy(tiny.tokenizer._tokenizer)
    plain.chat_template = None
    engine = await Tiny(tiny.model, TokenizerWrapper(plain)).engine()
    with pytest.raises(InputError, match="messages: the model has no chat template"):
        await engine.submit(GenerateRequest(messages=[hello()]))
    engine.close()


async def test_another_model_is_not_found(engine: GenerationEngine) -> None:
    with pytest.raises(NotFoundError, match="'big' is not served here, 'tiny' is"):
        await engine.submit(of_tokens([1], model="big"))


async def test_defaults_out_of_range_are_found_at_once(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"generation_config.json: top_p: "):
        await tiny.engine(defaults={"top_p": 3})


# The queue, cancelling


async def test_beyond_its_bound_the_queue_refuses(tiny: Tiny) -> None:
    engine = await tiny.engine(users=1, queue_limit=2)
    tickets = [await engine.submit(of_tokens([1], max_tokens=200)) for _ in range(3)]
    with pytest.raises(BusyError, match="the queue is full: 1 requests run and 2 wait"):
        await engine.submit(of_tokens([1]))
    tickets[1].cancel()
    await THREAD.run(lambda: None)  # what was posted before is done
    assert (await engine.submit(of_tokens([1]))).job.tokens == [1]
    engine.close()


@pytest.mark.parametrize("moment", ["queued", "prefill", "decode"])
async def test_cancelling_frees_the_caches(tiny: Tiny, moment: str) -> None:
    engine = await tiny.engine(users=1, context=4096, prefill_step=1)
    first = await engine.submit(of_tokens([5] * 3000 if moment == "prefill" else [5]))
    ticket = first if moment != "queued" else await engine.submit(of_tokens([6]))
    if moment == "prefill":
        await until(live_caches)
    elif moment == "decode":
        await anext(ticket)
    ticket.cancel()
    assert (await listen(ticket)).finish is None
    first.cancel()
    await until(lambda: live_caches() == 0)
    engine.close()


async def test_nothing_is_left_after_many_requests(engine: GenerationEngine) -> None:
    tickets = []
    for number in range(24):
        fields: dict[str, Any] = {"max_tokens": 4, "logprobs": 2} if number % 2 else {}
        if number % 3 == 0:
            fields["sampling"] = sampling(presence_penalty=1.0)
        ticket = await engine.submit(of_tokens(PROMPTS[number % 4], **fields))
        tickets.append(weakref.ref(ticket))
        if number % 5 == 0:
            ticket.cancel()
        await listen(ticket)
    del ticket
    await until(lambda: live_caches() == 0 and not any(ref() for ref in tickets))


# Failures


@pytest.mark.parametrize("error_at", [1, 2, 8], ids=["first prefill", "later prefill", "decode"])
async def test_when_a_machine_is_lost_all_requests_say_so(tiny: Tiny, error_at: int) -> None:
    model = Fragile(tiny.model)
    engine = await tiny.engine(model, users=2)
    model.error, model.error_at = UnavailableError("machine bob is gone"), error_at
    tickets = [await submit_or_none(engine, of_tokens(PROMPTS[1])) for _ in range(4)]
    for ticket in filter(None, tickets):
        with pytest.raises(UnavailableError, match="machine bob is gone"):
            await listen(ticket)
    with pytest.raises(UnavailableError, match="machine bob is gone"):
        await engine.submit(of_tokens([1]))
    assert engine.describe().state == "failed"
    assert engine.describe().detail == "machine bob is gone"
    engine.close()


async def submit_or_none(engine: GenerationEngine, request: GenerateRequest) -> Ticket | None:
    try:
        return await engine.submit(request)
    except UnavailableError:  # it may have failed for the one before
        return None


async def test_another_error_of_the_model_names_the_model(tiny: Tiny) -> None:
    model = Fragile(tiny.model)
    engine = await tiny.engine(model)
    model.error = RuntimeError("out of\nmemory")
    with pytest.raises(StageError, match="RuntimeError: out of memory"):
        await ask(engine, of_tokens([1]))
    engine.close()


async def test_a_new_model_serves_again_after_a_failure(tiny: Tiny) -> None:
    model = Fragile(tiny.model)
    engine = await tiny.engine(model)
    model.error = UnavailableError("machine bob is gone")
    with pytest.raises(UnavailableError):
        await ask(engine, of_tokens(PROMPTS[0]))
    await engine.set_model(tiny.model)
    received = await ask(engine, of_tokens(PROMPTS[0]))
    assert received.tokens == (await tiny.alone(PROMPTS[0])).tokens
    assert engine.describe().state == "ready"
    engine.close()


async def test_a_failure_frees_the_caches_and_the_model(tiny: Tiny) -> None:
    model = Fragile(tiny.model)
    engine = await tiny.engine(model)
    error = model.error = UnavailableError("machine bob is gone")
    model.error_at = 5
    with pytest.raises(UnavailableError, match=str(error)):
        await ask(engine, of_tokens([1]))
    gone = weakref.ref(model)
    del model
    await until(lambda: live_caches() == 0 and gone() is None)
    engine.close()


async def test_replacing_the_model_ends_what_runs(engine: GenerationEngine, tiny: Tiny) -> None:
    ticket = await engine.submit(of_tokens([1], max_tokens=200))
    await anext(ticket)
    await engine.set_model(tiny.model)
    with pytest.raises(UnavailableError, match="tiny is being loaded again"):
        await listen(ticket)
    assert (await ask(engine, of_tokens([1]))).finish is not None


async def test_before_it_is_loaded_a_model_is_unavailable(tiny: Tiny) -> None:
    config = GenerationConfig(StageSpec(context=256, users=1), model_name="tiny")
    engine = GenerationEngine(THREAD, tiny.tokenizer, config)
    with pytest.raises(UnavailableError, match="tiny is still loading"):
        await engine.submit(of_tokens([1]))
    assert engine.describe().state == "loading"
    engine.close()


async def test_closing_ends_every_stream(tiny: Tiny) -> None:
    engine = await tiny.engine(users=1)
    tickets = [await engine.submit(of_tokens([1], max_tokens=200)) for _ in range(3)]
    await anext(tickets[0])
    engine.close()
    for ticket in tickets:
        with pytest.raises(UnavailableError, match="tiny is shutting down"):
            await listen(ticket)
    with pytest.raises(UnavailableError, match="tiny is shutting down"):
        await engine.submit(of_tokens([1]))


async def test_closing_does_not_wait_for_a_model_that_hangs(tiny: Tiny) -> None:
    began, released = threading.Event(), threading.Event()

    class Stuck(Script):
        def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
            began.set()
            released.wait(scaled(60))
            return super().__call__(inputs, cache)

    engine = await tiny.engine(Stuck([65]))
    ticket = await engine.submit(of_tokens([1]))
    assert await asyncio.to_thread(began.wait, scaled(60))
    engine.close()
    with pytest.raises(UnavailableError, match="tiny is shutting down"):
        await listen(ticket)
    released.set()


async def test_whoever_looks_again_finds_the_same_end(tiny: Tiny) -> None:
    engine = await tiny.engine()
    ticket = await engine.submit(of_tokens([1], max_tokens=200))
    engine.close()
    for _ in range(2):
        with pytest.raises(UniclusterError):
            await listen(ticket)


async def test_an_asker_whose_loop_is_gone_does_not_hold_up_others(
    engine: GenerationEngine, tiny: Tiny
) -> None:
    def ask_and_leave() -> None:
        asyncio.run(engine.submit(of_tokens([1], max_tokens=200)))

    await asyncio.to_thread(ask_and_leave)
    assert (await ask(engine, of_tokens(PROMPTS[0]))).finish is not None
    await until(lambda: live_caches() == 0)


# Text: a scripted model says what the test wants said


async def say(tiny: Tiny, tokens: list[int], **fields: Any) -> Completion:
    engine = await tiny.engine(Script(tokens))
    received = await ask(engine, of_tokens([1], **({"max_tokens": 100} | fields)))
    engine.close()
    return received


@pytest.mark.parametrize("text", ["plain", "żółć 🦊!", "two\n lines ", "a<b", "日本"])
async def test_the_text_is_the_whole_decode(tiny: Tiny, text: str) -> None:
    received = await say(tiny, list(text.encode()))
    assert received.text == text
    assert received.tokens == list(text.encode())
    assert received.reason == "stop"


async def test_half_a_character_is_never_shown(tiny: Tiny) -> None:
    received = await say(tiny, list("a🦊b".encode()))
    assert received.texts == ["a", "", "", "", "🦊", "b"]


async def test_half_a_character_at_the_end_is_shown_as_such(tiny: Tiny) -> None:
    received = await say(tiny, list("a🦊".encode())[:3])
    assert received.text == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("STOP", ["STOP"], ""),
        ("one STO two", ["STOP"], "one STO two"),
        ("one ST", ["STOP"], "one ST"),
        ("ab abc", ["abc", "xyz"], "ab "),
        ("a🦊b", ["🦊"], "a"),
        ("aab", ["ab"], "a"),
    ],
)
async def test_a_stop_string_ends_the_answer_and_is_never_seen(
    tiny: Tiny, text: str, stop: list[str], left: str
) -> None:
    received = await say(tiny, list(text.encode()), stop=stop)
    assert received.text == left
    assert received.reason == "stop"


async def test_text_is_held_back_only_while_it_may_be_a_stop_string(tiny: Tiny) -> None:
    received = await say(tiny, list(b"a-b-->c"), stop=["-->"])
    assert received.texts == ["a", "", "-b", "", "", ""]


async def test_the_limit_of_tokens_gives_out_what_was_held_back(tiny: Tiny) -> None:
    received = await say(tiny, list(b"one STOP"), stop=["STOP"], max_tokens=6)
    assert received.text == "one ST"
    assert received.reason == "length"


async def test_reasoning_and_tool_calls_come_apart(load: Load) -> None:
    tiny = await load(marks=True)
    said = "<think>hm</think>Yes.<tool_call>{1}</tool_call><tool_call>{2}</tool_call>"
    received = await say(tiny, tiny.tokenizer.encode(said, add_special_tokens=False))
    assert (received.reasoning, received.text, received.tool_calls) == (
        "hm",
        "Yes.",
        ["{1}", "{2}"],
    )
    assert received.tokens == tiny.tokenizer.encode(said, add_special_tokens=False)


async def test_a_prompt_that_opens_the_reasoning_begins_in_it(load: Load) -> None:
    tiny = await load(marks=True)
    engine = await tiny.engine(Script([*b"hm", tiny.tokenizer.think_end_id, 33], prompt=2))
    received = await ask(engine, of_tokens([1, tiny.tokenizer.think_start_id]))
    engine.close()
    assert (received.reasoning, received.text) == ("hm", "!")
