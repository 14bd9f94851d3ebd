"""Answers to many JSON schemas over the HTTP door, each checked against its own."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import jsonschema

FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER
# It says nothing of the schema, which the answer must match all the same.
PROMPT = "Give me an example, as JSON."
MOST_TOKENS = 500
MOST_TRIES = 4


@dataclass(frozen=True)
class SchemaAnswer:
    """One answer. `wrong`: why it is not valid JSON of its schema; empty where it is.

    cut_off: answers before it that came to no end within MOST_TOKENS, as a schema may let them.
    """

    schema: Any
    text: str
    tokens: int
    wrong: str
    cut_off: int


async def answers_to(
    url: str, schemas: Sequence[Any], *, at_once: int, limit_s: float
) -> list[SchemaAnswer]:
    """Asks for one answer of each schema, `at_once` of them at a time, in their order.

    One that is cut off is asked for again, as its client would. limit_s: seconds for one answer.
    """
    places = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=limit_s) as client:

        async def one(number: int, schema: Any) -> SchemaAnswer:
            async with places:
                return await _answer_to(client, number, schema)

        return await asyncio.gather(*(one(*each) for each in enumerate(schemas)))


async def _answer_to(client: httpx.AsyncClient, number: int, schema: Any) -> SchemaAnswer:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    body = {
        "messages": [{"role": "user", "content": PROMPT}],
        "response_format": form,
        "temperature": 1,
        "max_tokens": MOST_TOKENS,
    }
    for tries in range(MOST_TRIES):
        response = await client.post("/v1/chat/completions", json={**body, "seed": number + tries})
        if response.status_code != 200:
            return SchemaAnswer(schema, "", 0, f"{response.status_code}: {response.text}", tries)
        answer = response.json()
        (choice,) = answer["choices"]
        text, tokens = choice["message"]["content"], answer["usage"]["completion_tokens"]
        if choice["finish_reason"] == "stop":
            return SchemaAnswer(schema, text, tokens, _wrong(schema, text), tries)
    reason = f"{MOST_TRIES} answers ended by their {choice['finish_reason']}"
    return SchemaAnswer(schema, text, tokens, reason, MOST_TRIES)


def _wrong(schema: Any, text: str) -> str:
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return ""
