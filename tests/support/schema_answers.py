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
MOST_TOKENS = 900


@dataclass(frozen=True)
class SchemaAnswer:
    """One answer. `wrong`: why it is not valid JSON of its schema; empty where it is."""

    schema: Any
    text: str
    tokens: int
    wrong: str


async def answers_to(
    url: str, schemas: Sequence[Any], *, at_once: int, limit_s: float
) -> list[SchemaAnswer]:
    """Asks for one answer of each schema, `at_once` of them at a time, in their order.

    The first of the door's models answers. limit_s: seconds for one answer.
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
        "seed": number,
        "max_tokens": MOST_TOKENS,
    }
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        return SchemaAnswer(schema, "", 0, f"{response.status_code}: {response.text}")
    answer = response.json()
    (choice,) = answer["choices"]
    text, tokens = choice["message"]["content"], answer["usage"]["completion_tokens"]
    return SchemaAnswer(schema, text, tokens, _wrong(schema, text, choice["finish_reason"]))


def _wrong(schema: Any, text: str, reason: str) -> str:
    if reason != "stop":
        return f"it ended by its {reason}"
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return ""
