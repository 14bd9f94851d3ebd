"""Requests whose answers are known from an undisturbed run, and how a disturbed one is judged."""

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from unicluster.client.answers import Delta, Event, Finish, TokenLogprob
from unicluster.client.client import AsyncClient
from unicluster.errors import UniclusterError

# Log probabilities of a prompt that was computed in other pieces differ by rounding.
TOLERANCE = 2e-3


@dataclass(frozen=True)
class Request:
    """One request, which is asked again and again."""

    name: str
    prompt: tuple[int, ...] | str
    options: Mapping[str, Any]


@dataclass
class Heard:
    """All that came of a stream. gap: the longest time in seconds without an event."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    error: UniclusterError | None = None
    gap: float = 0.0
    _last: float = field(default_factory=time.monotonic)

    def take(self, event: Event) -> None:
        now = time.monotonic()
        self.gap, self._last = max(self.gap, now - self._last), now
        if isinstance(event, Delta):
            self.text += event.text
            self.token_ids += event.token_ids
            self.logprobs += event.logprobs
        elif isinstance(event, Finish):
            self.finish = event


def requests(dice: random.Random) -> list[Request]:
    """Requests of all kinds of sampling, short and long; `with_stop` adds one more."""

    def prompt(most: int) -> tuple[int, ...]:
        return tuple(dice.randrange(1, 250) for _ in range(dice.randint(1, most)))

    greedy: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    sampled = {"temperature": 0.9, "ignore_eos": True}
    return [
        Request("greedy", prompt(30), {**greedy, "max_tokens": 300}),
        Request("greedy, short", "hello", {**greedy, "max_tokens": 60}),
        Request("greedy, long prompt", prompt(800), {**greedy, "max_tokens": 150}),
        Request("seed", prompt(30), {**sampled, "seed": 7, "max_tokens": 200}),
        Request("seed, top-p", "hello", {**sampled, "seed": 8, "top_p": 0.8, "max_tokens": 120}),
        Request(
            "penalties",
            prompt(40),
            {**greedy, "presence_penalty": 0.5, "repetition_penalty": 1.2, "max_tokens": 120},
        ),
        Request("logprobs", prompt(20), {**greedy, "logprobs": 2, "max_tokens": 100}),
        Request("regex", "hello", {"temperature": 0, "regex": "[a-z ]{150}", "max_tokens": 200}),
    ]


def with_stop(request: Request, heard: Heard) -> Request:
    """The same request, ended by a stop string from the middle of its answer."""
    middle = len(heard.text) // 2
    options = {**request.options, "stop": [heard.text[middle : middle + 12]]}
    return replace(request, name="stop string", options=options)


async def hear(
    client: AsyncClient, request: Request, wait: float, moved: Callable[[], None] = lambda: None
) -> Heard:
    """The answer, or as much of it as came before a typed error.

    TimeoutError: nothing came for `wait` seconds.
    """
    heard = Heard()
    prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    events: AsyncGenerator[Event, None] = client.stream(prompt, **request.options)
    try:
        while True:
            heard.take(await asyncio.wait_for(anext(events), wait))
            moved()
    except StopAsyncIteration:
        return heard
    except UniclusterError as error:
        heard.error = error
        return heard
    finally:
        await events.aclose()


def wrong(heard: Heard, known: Heard) -> str:
    """What is wrong with an answer, or nothing."""
    count = len(heard.token_ids)
    if heard.token_ids != known.token_ids[:count]:
        at = next(
            (
                n
                for n, (a, b) in enumerate(zip(heard.token_ids, known.token_ids, strict=False))
                if a != b
            ),
            len(known.token_ids),
        )
        return f"token {at} of {len(known.token_ids)} is another one"
    if not known.text.startswith(heard.text):
        return "its tokens are right, and its text is not"
    for ours, theirs in zip(heard.logprobs, known.logprobs, strict=False):
        same = [each.token_id for each in ours.top] == [each.token_id for each in theirs.top]
        if not same or not math.isclose(ours.logprob, theirs.logprob, abs_tol=TOLERANCE):
            return f"log probability {ours} instead of {theirs}"
    if heard.error is not None:
        return ""
    if heard.finish is None or known.finish is None:
        return "it ended without an end"
    if count != len(known.token_ids) or heard.text != known.text:
        return f"it ended after {count} of {len(known.token_ids)} tokens"
    if len(heard.logprobs) != len(known.logprobs):
        return f"{len(heard.logprobs)} of {len(known.logprobs)} log probabilities"
    ends = [
        (end.reason, end.stop_string, end.usage.prompt_tokens, end.usage.completion_tokens)
        for end in (heard.finish, known.finish)
    ]
    return "" if ends[0] == ends[1] else f"end {ends[0]} instead of {ends[1]}"
