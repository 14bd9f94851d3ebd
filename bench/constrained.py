"""Time a token of answers held to a JSON schema, beside free ones of the same deployment.

`python -m bench.constrained`: SmolLM2-135M-Instruct, a real vocabulary of 49,152, over two agents
here, through `serve` and `Client` with default settings. Free and constrained answers take
turns; figures are medians.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tests.support.cluster import LocalCluster
from tests.support.real_model import MISSING, gguf_file, safetensors_folder
from unicluster.client.client import Client

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
SCHEMA = json.dumps({"type": "array", "items": ANIMAL, "minItems": 8})
FREE, SCHEMATIC, ANY_JSON = "free", "held to a schema", "held to JSON"
KINDS: dict[str, dict[str, Any]] = {
    FREE: {"ignore_eos": True},
    SCHEMATIC: {"json_schema": SCHEMA},
    ANY_JSON: {"json_object": True},
}


def milliseconds(client: Client, tokens: int, options: dict[str, Any]) -> float:
    """Per token of one answer's decode."""
    answer = client.chat(PROMPT, temperature=0, max_tokens=tokens, no_reuse=True, **options)
    count = answer.usage.completion_tokens
    return answer.timings.decode_s * 1e3 / max(count - 1, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
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
        with cluster.serve(model, "--context", "2048") as server, server.client() as client:
            stages = len(server.describe().stages)
            for kind in KINDS.values():  # the first one compiles and makes the vocabulary
                milliseconds(client, 8, kind)
            figures: dict[str, list[float]] = {name: [] for name in KINDS}
            for _ in range(options.rounds):
                for name, kind in KINDS.items():
                    figures[name].append(milliseconds(client, options.tokens, kind))
    print(f"SmolLM2-135M-Instruct, {options.engine}, {stages} stages, {options.tokens} tokens")
    free = median(figures[FREE])
    for name, values in figures.items():
        print(f"{name:18} {median(values):6.2f} ms a token, {median(values) / free:.3f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
