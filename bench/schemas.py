"""Two hundred JSON schemas over the HTTP door: is every answer valid?

    python -m bench.schemas [--model smollm2|demo] [--engine mlx|ggml] [--count 200]

SmolLM2-135M-Instruct or the demo model over two agents here, with default settings but for its
users: nested objects, enums, references, arrays, formats, patterns and numbers with bounds
(tests/support/schemas.py), four at a time at temperature 1. An answer is wrong where it is
refused or does not match its schema, formats included. One without an end in 300 tokens is asked
for again, twice: strings and recursion without a limit may go on for ever, and these
are counted apart. Ends with exit code 1 where one is wrong.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.support.cluster import LocalCluster
from tests.support.real_model import MISSING, gguf_file, safetensors_folder
from tests.support.schema_answers import answers_to
from tests.support.schemas import resolved, schemas

USERS = 4
LIMIT_SECONDS = 600.0
MEMORY = {"demo": "1GB", "ggml": "300MB", "mlx": "500MB"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("smollm2", "demo"), default="smollm2")
    parser.add_argument("--engine", choices=("mlx", "ggml"), default="ggml", help="of smollm2")
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    model: Path | str = "demo"
    if options.model == "smollm2":
        if (file := gguf_file()) is None:
            sys.exit(MISSING)
        model = file if options.engine == "ggml" else safetensors_folder(file)
    memory = MEMORY["demo" if options.model == "demo" else options.engine]
    asked = [resolved(schema) for schema in schemas(options.count)]
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder)) as cluster:
        cluster.start_agents("ann", "bob", memory=memory)
        settings = ("--context", "2048", "--users", str(USERS), "--nodes", "ann,bob")
        with cluster.serve(model, *settings) as server:
            stages = len(server.describe().stages)
            begun = time.monotonic()
            answers = asyncio.run(
                answers_to(server.http, asked, at_once=USERS, limit_s=LIMIT_SECONDS)
            )
            seconds = time.monotonic() - begun
    wrong = [answer for answer in answers if answer.wrong]
    for answer in wrong:
        print(f"WRONG: {answer.wrong}: {answer.text[:200]!r} of {str(answer.schema)[:300]}")
    name = options.model if options.model == "demo" else f"SmolLM2-135M-Instruct, {options.engine}"
    print(
        f"{name}, {stages} stages: {sum(answer.ended for answer in answers) - len(wrong)} of "
        f"{len(answers)} answers valid, {len(wrong)} wrong, "
        f"{sum(not answer.ended for answer in answers)} without an end, "
        f"{median(answer.tokens for answer in answers):.0f} tokens at the median, "
        f"{max(answer.tokens for answer in answers)} at most, {seconds:.0f} s; "
        f"{sum(answer.cut_off for answer in answers)} cut off, and asked for again"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
