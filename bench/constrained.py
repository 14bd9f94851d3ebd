"""Time a token of answers held to a JSON schema, beside free ones of the same deployment.

    python -m bench.constrained [--engine mlx|ggml] [--tokens 96] [--rounds 8]

SmolLM2-135M-Instruct, a real vocabulary of 49,152, over two agents here, streamed through the HTTP
door with default settings. In each round free and constrained answers take turns, the first of
which changes; a ratio is the median of the rounds' ratios to the free answer. Ends with exit code 1
where an answer with a schema takes more than 1.05 times as long a token as a free one.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from tests.support.cluster import LocalCluster
from tests.support.real_model import MISSING, gguf_file, safetensors_folder

LIMIT = 1.05
PROMPT = "List some animals, each with its name, number of legs and a short description."
ANIMAL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "legs": {"type": "integer", "minimum": 0, "maximum": 100},
        "description": {"type": "string", "maxLength": 80},
    },
    "required": ["name", "legs", "description"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ANIMAL, "minItems": 8}
FREE, SCHEMATIC, ANY_JSON = "free", "held to a schema", "held to JSON"
FORMS: dict[str, Any] = {
    FREE: {"type": "text"},
    SCHEMATIC: {"type": "json_schema", "json_schema": {"name": "animals", "schema": SCHEMA}},
    ANY_JSON: {"type": "json_object"},
}


def milliseconds(client: httpx.Client, tokens: int, form: Any) -> float:
    """Per token of one answer, after its first."""
    body = {
        "messages": [{"role": "user", "content": PROMPT}],
        "response_format": form,
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    at: list[float] = []
    count = 0
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                at.append(time.perf_counter())
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
    return (at[-1] - at[0]) * 1e3 / max(count - 1, 1)


def measure(client: httpx.Client, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a token of each round, by form."""
    for form in FORMS.values():  # the first one compiles, and makes the vocabulary
        milliseconds(client, 8, form)
    figures: dict[str, list[float]] = {name: [] for name in FORMS}
    names = list(FORMS)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            figures[name].append(milliseconds(client, tokens, FORMS[name]))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("mlx", "ggml"), default="ggml")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    file = gguf_file()
    if file is None:
        sys.exit(MISSING)
    model = file if options.engine == "ggml" else safetensors_folder(file)
    memory = "140MB" if options.engine == "ggml" else "500MB"
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder)) as cluster:
        cluster.start_agents("ann", "bob", memory=memory)
        with cluster.serve(model, "--context", "2048") as server:
            stages = len(server.describe().stages)
            with httpx.Client(base_url=server.http, timeout=600) as client:
                figures = measure(client, options.tokens, options.rounds)
    print(f"SmolLM2-135M-Instruct, {options.engine}, {stages} stages, {options.tokens} tokens")
    ratios = {}
    for name, values in figures.items():
        each = sorted(value / free for value, free in zip(values, figures[FREE], strict=True))
        ratios[name] = median(each)
        print(
            f"{name:18} {median(values):6.2f} ms a token, {ratios[name]:.3f} x "
            f"({each[0]:.3f} to {each[-1]:.3f})"
        )
    return ratios[SCHEMATIC] > LIMIT


if __name__ == "__main__":
    sys.exit(main())
