"""Tool calls of SmolLM2-135M-Instruct over the HTTP door: are their arguments valid?

    python -m bench.calls [--count 24]

The model has tools in its chat template (that of the GGUF is replaced), over two agents here. Each
tool has an object of tests/support/schemas.py as its parameters; it is asked for with each
tool_choice, and beside it there is another tool. With `required` and a named one there must be a
call, with `strict` tools every call there is must match its schema, and with plain ones and auto
an answer may be anything that ends. Ends with exit code 1 where that is not so.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from tests.support.cluster import LocalCluster
from tests.support.real_model import MISSING, gguf_file, gguf_with_tools
from tests.support.schemas import resolved, schemas

USERS = 4
LIMIT_SECONDS = 600.0
MOST_TOKENS = 700
CLOCK = {"type": "object", "properties": {}, "additionalProperties": False}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "note"}}


@dataclass(frozen=True)
class Way:
    """One way of asking for a call."""

    name: str
    choice: Any
    strict: bool
    must: bool


WAYS = (
    Way("required", "required", strict=False, must=True),
    Way("required, strict", "required", strict=True, must=True),
    Way("named", NAMED, strict=False, must=True),
    Way("auto, strict", "auto", strict=True, must=False),
    Way("auto", "auto", strict=False, must=False),
)


def strict_form(schema: Any) -> Any:
    """The schema with all members of its objects required, as strict tools need it."""
    if isinstance(schema, list):
        return [strict_form(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    formed = {name: strict_form(each) for name, each in schema.items()}
    if schema.get("type") == "object" and "properties" in schema:
        formed |= {"required": list(schema["properties"]), "additionalProperties": False}
    return formed


def tool(name: str, parameters: Any, *, strict: bool) -> Any:
    function = {"name": name, "description": f"{name}s it", "parameters": parameters}
    return {"type": "function", "function": function | {"strict": strict}}


async def calls_of(client: httpx.AsyncClient, way: Way, schema: Any, seed: int) -> list[Any]:
    """The calls of one answer. Raises ValueError for what is not as it must be."""
    both = {"note": schema, "clock": CLOCK}
    body = {
        "messages": [{"role": "user", "content": "Note an example, by calling the function note."}],
        "tools": [tool(name, of, strict=way.strict) for name, of in both.items()],
        "tool_choice": way.choice,
        "temperature": 1,
        "seed": seed,
        "max_tokens": MOST_TOKENS,
    }
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise ValueError(f"{response.status_code}: {response.text}")
    (choice,) = response.json()["choices"]
    calls: list[Any] = choice["message"].get("tool_calls") or []
    if way.must and not calls:
        raise ValueError(f"no call, ended by {choice['finish_reason']}: {choice['message']}")
    if way.choice is NAMED and {call["function"]["name"] for call in calls} != {"note"}:
        raise ValueError(f"another tool was called: {calls}")
    for call in calls if way.must or way.strict else ():
        function = call["function"]
        jsonschema.validate(json.loads(function["arguments"]), both[function["name"]])
    return calls


async def ask_all(url: str, count: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Counts by way, and what was wrong."""
    found = {way.name: Counter[str]() for way in WAYS}
    wrong: list[str] = []
    places = asyncio.Semaphore(USERS)
    objects = [each for each in map(resolved, schemas(400)) if "properties" in each]
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_SECONDS) as client:

        async def one(way: Way, number: int, schema: Any) -> None:
            async with places:
                counts = found[way.name]
                counts["answers"] += 1
                try:
                    calls = await calls_of(client, way, schema, number)
                except (ValueError, jsonschema.ValidationError) as error:
                    wrong.append(f"{way.name}: {error!s:.600}: {json.dumps(schema)}")
                    return
                counts["with calls"] += bool(calls)
                counts["calls"] += len(calls)

        await asyncio.gather(
            *(
                one(way, number, strict_form(schema) if way.strict else schema)
                for number, schema in enumerate(objects[:count])
                for way in WAYS
            )
        )
    return found, wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=24)
    options = parser.parse_args()
    if (file := gguf_file()) is None:
        sys.exit(MISSING)
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder)) as cluster:
        model = gguf_with_tools(file, Path(folder))
        cluster.start_agents("ann", "bob", memory="300MB")
        with cluster.serve(model, "--context", "2048", "--users", str(USERS)) as server:
            found, wrong = asyncio.run(ask_all(server.http, options.count))
    for name, counts in found.items():
        print(
            f"{name:18} {counts['answers']:3} answers, {counts['with calls']:3} with calls, "
            f"{counts['calls']:3} calls"
        )
    for what in wrong[:20]:
        print(f"WRONG: {what}")
    print(f"{len(wrong)} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
