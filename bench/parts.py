"""Parts of a token's way round the ring, as its trace names them: medians over many tokens.

    python -m bench.parts [--size 10M|125M] [--stages N] [--tokens N] [--off]

One user, greedy, mTLS on, all processes on this machine, whose clocks are one. A hop is `handing`
(from the thread that computed to the event loop), `wire` (gRPC, TLS, and the threads of gRPC on
both sides) and `queue` (from the event loop to the thread that computes). Tracing waits for the
logits where MLX would go on, so `sampling` is apart, and a token takes a little longer than else.
--off: steps are not built before their input is there; building takes a core from the hop where
machines share cores, as here.
"""

import argparse
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from bench.hop import PROMPT_TOKENS, WARM_UP, Subject, loaded
from bench.models import write_llama
from node.metering.timeline import Timeline, recorded
from unicluster.v1.meters_pb2 import Span

HOP = ("handing", "wire", "queue")
# Of no place on the way: they hold others.
WHOLE = ("request", "away")


def traced(model: Any, stages: int, tokens: int) -> list[Span]:
    """The spans of `tokens` decode steps, after the warm-up."""
    for machine in range(1, stages):
        model.trips.clocks.record(machine, 0.0, 0.0, 0.0)  # the head's own
    timeline = Timeline(time.perf_counter())
    steps = generate_step(mx.arange(1, PROMPT_TOKENS + 1), model, max_tokens=WARM_UP + tokens)
    for _ in range(WARM_UP):
        next(steps)
    for _ in range(tokens):
        with recorded("step", [timeline]):
            next(steps)
            mx.synchronize()
    return list(timeline.to_wire().spans)


def table(spans: list[Span], stages: int) -> str:
    """Milliseconds of each part, in the order in which a frame meets them."""
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    hops: dict[int, float] = defaultdict(float)
    for span in sorted(spans, key=lambda span: span.start_s):
        if span.name not in WHOLE:
            seconds[span.name, span.stage].append(span.duration_s)
        if span.name in HOP:
            hops[span.trip] += span.duration_s / stages
    lines = [f"{'':24}{'median':>10}{'least 10th':>12}{'p90':>10}"]
    lines += [_line(f"{name}, stage {stage}", each) for (name, stage), each in seconds.items()]
    lines.append(_line("a hop, all its parts", list(hops.values())))
    return "\n".join(lines)


def _line(name: str, seconds: list[float]) -> str:
    least, median, most = np.percentile(np.array(seconds) * 1e3, [10, 50, 90])
    return f"{name:24}{median:10.3f}{least:12.3f}{most:10.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["10M", "125M"], default="10M")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--off", action="store_true", help="without building ahead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_llama(Path(folder), options.size)
        with loaded(path, Subject(options.stages, not options.off)) as model:
            spans = traced(model, options.stages, options.tokens)
    print(table(spans, options.stages))
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, milliseconds")


if __name__ == "__main__":
    main()
