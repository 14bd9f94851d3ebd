"""Many clients that stream answers from the HTTP door, one after another, for some time."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

WORDS = ("a fox", "two red birds", "in the wood", "an old owl", "what then?", "and so", "said")
ANTHROPIC_END = '"message_stop"'


@dataclass
class Streams:
    """What came of all streams. Gaps are seconds without a piece of an answer, its first too."""

    ended: Counter[str] = field(default_factory=Counter)
    pieces: int = 0
    longest_gap: float = 0.0
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Door:
    """A path that streams: its body, whether a line has a piece, and whether it is the last one."""

    path: str
    body: Callable[[str, int], dict[str, Any]]
    is_piece: Callable[[str], bool]
    is_end: Callable[[str], bool]


def _said(prompt: str, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "max_tokens": tokens, "stream": True}


def _ollama(prompt: str, tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "options": {"num_predict": tokens}, "stream": True}


def _is_openai_piece(line: str) -> bool:
    return line.startswith('data: {"id"')


DOORS = (
    _Door("/v1/chat/completions", _said, _is_openai_piece, "data: [DONE]".__eq__),
    _Door(
        "/v1/completions",
        lambda prompt, tokens: {"prompt": prompt, "max_tokens": tokens, "stream": True},
        _is_openai_piece,
        "data: [DONE]".__eq__,
    ),
    _Door(
        "/v1/messages",
        _said,
        lambda line: "content_block_delta" in line and line.startswith("data: "),
        lambda line: line.startswith("data: ") and ANTHROPIC_END in line,
    ),
    _Door(
        "/api/generate",
        _ollama,
        lambda line: line.startswith("{"),
        lambda line: line.startswith("{") and json.loads(line).get("done") is True,
    ),
)


async def stream_from_many(
    url: str, clients: int, seconds: float, *, stalled_s: float, seed: int = 0
) -> Streams:
    """So many clients, each with a connection of its own, ask for `seconds`, and end their answers.

    A stream without a piece for `stalled_s` is wrong, as is one that has an error or no end.
    """
    streams = Streams()
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        dice = random.Random(seed * 1_000_003 + number)
        async with httpx.AsyncClient(base_url=url, timeout=stalled_s) as http:
            while time.monotonic() < end:
                door = dice.choice(DOORS)
                try:
                    await _one(http, door, dice, streams, stalled_s)
                except (httpx.HTTPError, TimeoutError, ValueError) as error:
                    streams.wrong.append(f"{door.path}: {type(error).__name__}: {error}")
                else:
                    streams.ended[door.path] += 1

    await asyncio.gather(*map(client, range(clients)))
    return streams


async def _one(
    http: httpx.AsyncClient, door: _Door, dice: random.Random, streams: Streams, stalled_s: float
) -> None:
    prompt = " ".join(dice.choices(WORDS, k=dice.randint(1, 12)))
    tokens = dice.randint(10, 64)
    async with http.stream("POST", door.path, json=door.body(prompt, tokens)) as answer:
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code}: {(await answer.aread()).decode()}")
        lines = answer.aiter_lines()
        heard = time.monotonic()
        ended = False
        while True:
            left = heard + stalled_s - time.monotonic()
            try:
                # A comment keeps the connection alive, and is no piece.
                line = await asyncio.wait_for(anext(lines), left)
            except StopAsyncIteration:
                break
            if '"error"' in line:
                raise ValueError(line)
            ended |= door.is_end(line)
            if door.is_piece(line):
                now = time.monotonic()
                streams.longest_gap = max(streams.longest_gap, now - heard)
                streams.pieces += 1
                heard = now
        if not ended:
            raise ValueError("the stream has no end")
