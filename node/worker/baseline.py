"""The baseline, mlx-lm itself: `python -m node.worker.baseline MODEL`, one process or a ring.

MODEL is a directory or `demo`. Reads requests from standard input, a line of JSON each,
{"prompt": [ids], "tokens": count}, and writes the tokens' ids to standard output, a line each as
they come. Says "ready" first, or "refused: " and why.

With MLX_RANK and MLX_HOSTFILE set it is one rank of mlx-lm's own pipeline over MLX's ring: all
ranks must read the same requests, and rank 0 writes.
"""

import json
import os
import sys
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from node.mlx.compat import literal_path
from node.weights import store


def load(name: str, group: Any) -> Any:
    """The model, or this rank's part of it. Raises ValueError where mlx-lm can't cut it."""
    checkpoint = store.find(name, "")
    if checkpoint is None:
        raise ValueError(f"{name} is not on this machine")
    model: Any = load_model(literal_path(checkpoint.root), lazy=True)[0]
    if group is not None:
        if not hasattr(getattr(model, "model", None), "pipeline"):
            raise ValueError(f"mlx-lm has no pipeline for {model.model_type}")
        model.model.pipeline(group)
    mx.eval(model.parameters())
    return model


def main() -> None:
    group = mx.distributed.init(strict=True, backend="ring") if "MLX_RANK" in os.environ else None
    silent = group is not None and group.rank() > 0
    try:
        model = load(sys.argv[1], group)
    except ValueError as error:
        print(f"refused: {error}", flush=True)
        return
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        steps = generate_step(mx.array(request["prompt"]), model, max_tokens=request["tokens"])
        for token, _ in steps:
            if not silent:
                print(int(token), flush=True)


if __name__ == "__main__":
    main()
