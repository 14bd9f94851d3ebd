"""The command line of `serve` that does what a plan says."""

import shlex

from coordinator.planning.engines import ENGINES
from coordinator.planning.placement import Plan
from coordinator.planning.variants import ModelVariants

# In place of a GGUF that the plan assumes, and nobody has named.
FILE = "FILE.gguf"


def serve_line(
    model: str,
    best: Plan,
    variants: ModelVariants,
    *,
    quant: str = "",
    kv_bits: int = 0,
    speculate: str = "",
    gguf: str | None = None,
    engine: str = "auto",
    nodes: str | None = None,
) -> str:
    """The command, quoted for a shell; "" for a configuration alone, which has no weights.

    `quant` as planned, which may be the default of `plan` and is not that of `serve`.
    """
    if model.endswith(".json"):
        return ""
    assumed = variants.hypothetical and any(ENGINES[e].reads_gguf for e in best.engines)
    words = ["unicluster", "serve", model]
    options = {
        "--quant": quant,
        "--context": str(variants.layout.context),
        "--users": str(best.users) if best.users > 1 else "",
        "--kv-bits": str(kv_bits) if kv_bits else "",
        "--speculate": speculate,
        "--gguf": gguf or (FILE if assumed else ""),
        "--engine": engine if engine != "auto" else "",
        "--objective": best.objective if best.objective != "latency" else "",
        "--nodes": nodes or "",
    }
    for flag, value in options.items():
        words += [flag, value] if value else []
    return shlex.join(words)
