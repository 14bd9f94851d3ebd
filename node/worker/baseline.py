"""The baseline, mlx-lm or llama.cpp itself: `python -m node.worker.baseline MODEL`.

MODEL is a directory, a GGUF or `demo`. Reads requests from standard input, a line of JSON each,
{"prompt": [ids], "tokens": count}, and writes the tokens' ids to standard output, a line each as
they come. Says "ready" first, or "refused: " and why.

With MLX_RANK and MLX_HOSTFILE set it is one rank of mlx-lm's own pipeline over MLX's ring: all
ranks must read the same requests, and rank 0 writes.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from node.mlx.compat import literal_path
from node.weights import store
from unicluster.checkpoints.checkpoint import is_gguf
from unicluster.errors import StageError

Answer = Callable[[list[int], int], Iterable[int]]
"""Greedy tokens after a prompt, so many."""


def load(name: str, group: Any) -> Answer:
    """The model, or this rank's part of it. Raises ValueError where there is none to compare with.

    Raises StageError for a GGUF that llama.cpp can't load.
    """
    checkpoint = store.find(name, "")
    if checkpoint is None:
        raise ValueError(f"{name} is not on this machine")
    weights = checkpoint.manifest.weights
    if any(map(is_gguf, weights)):
        if group is not None:
            raise ValueError("mlx-lm has no pipeline for GGUFs")
        from node.worker.baseline_gguf import WholeGguf

        return WholeGguf(checkpoint.root / weights[0]).answer
    model: Any = load_model(literal_path(checkpoint.root), lazy=True)[0]
    if group is not None:
        if not hasattr(getattr(model, "model", None), "pipeline"):
            raise ValueError(f"mlx-lm has no pipeline for {model.model_type}")
        model.model.pipeline(group)
    mx.eval(model.parameters())

    def answer(prompt: list[int], tokens: int) -> Iterable[int]:
        steps = generate_step(mx.array(prompt), model, max_tokens=tokens)
        return (int(token) for token, _ in steps)

    return answer


def main() -> None:
    group = mx.distributed.init(strict=True, backend="ring") if "MLX_RANK" in os.environ else None
    silent = group is not None and group.rank() > 0
    try:
        answer = load(sys.argv[1], group)
    except (ValueError, StageError) as error:
        print(f"refused: {error}", flush=True)
        return
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        for token in answer(request["prompt"], request["tokens"]):
            if not silent:
                print(token, flush=True)


if __name__ == "__main__":
    main()
