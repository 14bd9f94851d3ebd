"""Timing answers: prompts of exact lengths that were never asked before, token by token.

Everything here asks through an `Ask`, so the same measures serve a deployment's clients and an
engine without any network. Each function measures once; who calls it takes medians over rounds.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Protocol

# Tokens of a prompt, for measures that are not about prompts.
SHORT = 32
# Tokens that an answer gets before the measure that it runs beside begins.
UNDER_WAY = 16


class Ask(Protocol):
    """Asks for exactly `tokens` tokens after `prompt`; yields them as they come.

    `reuse`: what was computed for other prompts may be used, and this one's may be kept.
    """

    def __call__(
        self, prompt: Sequence[int], tokens: int, *, reuse: bool = False
    ) -> AsyncGenerator[Sequence[int], None]: ...


@dataclass(frozen=True)
class TimedAnswer:
    """An answer, and when each token came; all by time.perf_counter."""

    asked: float
    at: list[float]
    tokens: list[int]

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.at[0] - self.asked

    @property
    def steps_s(self) -> list[float]:
        """Seconds between tokens."""
        return [later - earlier for earlier, later in pairwise(self.at)]


def new_prompt(tokens: int) -> list[int]:
    """Random token ids from 1 to 255, which every vocabulary has."""
    return [1 + byte % 255 for byte in os.urandom(tokens)]


async def timed(
    ask: Ask, prompt: Sequence[int], tokens: int, *, reuse: bool = False
) -> TimedAnswer:
    """Times an answer to its end."""
    answer = TimedAnswer(time.perf_counter(), [], [])
    async for ids in ask(prompt, tokens, reuse=reuse):
        answer.at.extend([time.perf_counter()] * len(ids))
        answer.tokens.extend(ids)
    return answer


async def step_seconds(ask: Ask, tokens: int, prompt: int = SHORT) -> list[float]:
    """Seconds of each step of one answer alone."""
    return (await timed(ask, new_prompt(prompt), tokens)).steps_s


async def speed(ask: Ask, users: int, tokens: int, prompt: int = SHORT) -> float:
    """Tokens a second of all users together, while all of them decode."""
    asked = (timed(ask, new_prompt(prompt), tokens) for _ in range(users))
    answers = await asyncio.gather(*asked)
    begin, end = max(each.at[0] for each in answers), min(each.at[-1] for each in answers)
    return sum(begin < at <= end for each in answers for at in each.at) / (end - begin)


async def first_token(ask: Ask, prompt: int) -> float:
    """TTFT in seconds, of a prompt of so many tokens."""
    return (await timed(ask, new_prompt(prompt), 1)).first_s


async def turns(ask: Ask, history: int, said: int = 16, new: int = 16) -> tuple[float, float]:
    """TTFT in seconds of a chat's first turn, `history` tokens long, and of its second."""
    prompt = new_prompt(history)
    first = await timed(ask, prompt, said, reuse=True)
    second = await timed(ask, [*prompt, *first.tokens, *new_prompt(new)], 1, reuse=True)
    return first.first_s, second.first_s


@dataclass(frozen=True)
class Gap:
    """Seconds: what a running answer's token takes undisturbed, and the longest while a prompt
    of another is prefilled, which takes `prefill_s`.
    """

    step_s: float
    longest_s: float
    prefill_s: float


async def gap(ask: Ask, prompt: int, longest: int) -> Gap:
    """Effect of another's prompt on an answer in progress that may have `longest` tokens."""
    running = ask(new_prompt(SHORT), longest)
    times = []
    for _ in range(UNDER_WAY):
        await anext(running)
        times.append(time.perf_counter())
    step = median(later - earlier for earlier, later in pairwise(times))
    prefill = asyncio.create_task(first_token(ask, prompt))
    times = times[-1:]
    async for _ in running:
        times.append(time.perf_counter())
        if prefill.done():
            break
    await running.aclose()
    return Gap(step, max(later - earlier for earlier, later in pairwise(times)), await prefill)
