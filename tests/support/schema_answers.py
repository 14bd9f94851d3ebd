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
MOST_TOKENS = 300
MOST_TRIES = 3


@dataclass(frozen=True)
class SchemaAnswer:
    """One answer. `wrong`: why it is not valid JSON of its schema; empty where it is.

    cut_off: answers before it that came to no end within MOST_TOKENS. ended: whether this one did;
    strings, keys and recursion to which a schema sets no limit need not.
    """

    schema: Any
    text: str
    tokens: int
    wrong: str
    cut_off: int
    ended: bool = True


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
    return SchemaAnswer(schema, text, tokens, "", MOST_TRIES, ended=False)


def _wrong(schema: Any, text: str) -> str:
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return ""
