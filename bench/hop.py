"""Cost of a hop: decode over stages against one mlx-lm process, in the same run.

    python -m bench.hop [--size 10M] [--rounds N] [--tokens N] [--stages 2 3] [--off] [--json FILE]

One user, greedy, mTLS on, all processes on this machine. Each round decodes the same prompt
with every subject, in an order that turns from round to round, so that drift hits all alike.
Subjects are loaded anew each round, since where a model falls in memory changes its speed.
Nothing stops at an end token, and the first tokens of each decode are not counted.

A ring of S stages has S hops, the way back to the head included. The added time per hop is,
in one round, (median token time over S stages - median token time of the plain model) / S,
and of that the median over all rounds. For the 99th percentile the first median is the 99th
percentile of the tokens over S stages. The plain model's own 99th percentile, less its
median, tells how much of that is the machine's noise.

That is all that a cut costs: the hop, and computing in pieces, by processes that here share
cores and caches. An empty frame, timed after each decode, is the hop alone: gRPC, TLS and all
threads that a frame passes, but no tensors and no computing.

With --off, each ring is measured once more without building steps before their input is there.
The least decile is of all tokens together, of all rounds: what a machine that has other work to
do as well comes to in its quiet moments.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from bench.models import write_llama
from coordinator.planning.placement import Layout
from coordinator.planning.planner import split_evenly
from node.engines.mlx_layout import inspect
from node.inprocess.loader import describe_here, load_local
from unicluster.trust.cluster import Cluster

Times = np.ndarray[Any, Any]

PROMPT_TOKENS = 32
WARM_UP = 20
NOISY = 0.1  # spread of the plain model's rounds, relative to their median


@dataclass(frozen=True)
class Cost:
    """Times in seconds."""

    stages: int
    prebuilt: bool  # decode steps are built before their input arrives
    token_median: float
    token_p10: float
    token_p99: float
    hop_median: float
    hop_p99: float
    empty_median: float  # of a hop, with a frame that asks for no computing
    empty_p99: float


@dataclass(frozen=True)
class Result:
    """The plain model's token times, and what the stages add."""

    rounds: int
    tokens: int
    plain_median: float
    plain_p10: float
    plain_p99: float
    spread: float  # between the quartiles of the plain model's rounds, relative to their median
    load: float  # processes that wanted a core, on average, over the last minute
    cores: int
    costs: list[Cost]


class Subject(NamedTuple):
    """A model that decodes: mlx-lm's own for one stage, or a ring."""

    stages: int
    prebuilt: bool


PLAIN = Subject(1, True)


@contextmanager
def loaded(path: Path, subject: Subject) -> Iterator[Any]:
    """The model of a subject."""
    if subject == PLAIN:
        yield mlx_lm.load(str(path))[0]
        return
    identity = Cluster.new().issue("local")
    checkpoint = describe_here(str(path), identity)
    layout = Layout.from_proto(inspect(checkpoint))
    cuts = split_evenly(layout, subject.stages)
    with load_local(checkpoint, "", cuts, identity, prebuilt=subject.prebuilt)[0] as model:
        yield model


def decode(model: Any, tokens: int) -> Times:
    """Seconds of each of `tokens` decode steps, after the warm-up."""
    prompt = mx.arange(1, PROMPT_TOKENS + 1)
    steps = generate_step(prompt, model, max_tokens=WARM_UP + tokens)
    times = [time.perf_counter() for _ in steps]
    return np.diff(times)[WARM_UP - 1 :]


def empty_hops(model: Any, stages: int, count: int) -> Times:
    """Seconds a hop of frames that ask how many caches there are: one frame a remote stage."""
    times = [time.perf_counter()]
    for _ in range(WARM_UP + count):
        model.live_caches()
        times.append(time.perf_counter())
    return np.diff(times)[WARM_UP:] / ((stages - 1) * stages)


def measure(path: Path, rings: Sequence[Subject], rounds: int, tokens: int) -> Result:
    """Decodes `rounds` times with each subject."""
    subjects = [PLAIN, *rings]
    found: dict[Subject, list[Times]] = {subject: [] for subject in subjects}
    empty: dict[Subject, list[Times]] = {subject: [] for subject in rings}
    for turn in range(rounds):
        first = turn % len(subjects)
        for subject in subjects[first:] + subjects[:first]:
            with loaded(path, subject) as model:
                found[subject].append(decode(model, tokens))
                if subject != PLAIN:
                    empty[subject].append(empty_hops(model, subject.stages, tokens))
        show_progress(turn + 1, rounds)
    plain = np.stack(found[PLAIN])
    medians = np.median(plain, axis=1)
    low, high = np.percentile(medians, [25, 75])
    return Result(
        rounds=rounds,
        tokens=tokens,
        plain_median=float(np.median(medians)),
        plain_p10=float(np.percentile(plain, 10)),
        plain_p99=float(np.median(np.percentile(plain, 99, axis=1))),
        spread=float((high - low) / np.median(medians)),
        load=os.getloadavg()[0],
        cores=os.cpu_count() or 1,
        costs=[cost(ring, np.stack(found[ring]), medians, np.stack(empty[ring])) for ring in rings],
    )


def cost(ring: Subject, times: Times, plain: Times, empty: Times) -> Cost:
    """`times` and `empty` have shape (rounds, tokens); `plain` is the median of each round."""
    medians = np.median(times, axis=1)
    tails = np.percentile(times, 99, axis=1)
    return Cost(
        stages=ring.stages,
        prebuilt=ring.prebuilt,
        token_median=float(np.median(medians)),
        token_p10=float(np.percentile(times, 10)),
        token_p99=float(np.median(tails)),
        hop_median=float(np.median((medians - plain) / ring.stages)),
        hop_p99=float(np.median((tails - plain) / ring.stages)),
        empty_median=float(np.median(empty)),
        empty_p99=float(np.median(np.percentile(empty, 99, axis=1))),
    )


def show_progress(done: int, rounds: int) -> None:
    if sys.stderr.isatty():
        print(f"\rround {done} of {rounds}", end="\n" if done == rounds else "", file=sys.stderr)


def table(result: Result, parameters: int) -> str:
    """The result for people, in milliseconds."""
    lines = [
        f"{parameters / 1e6:.1f} M parameters, float32, batch 1, mTLS, one machine of "
        f"{result.cores} cores; {result.rounds} rounds of {result.tokens} tokens",
        "",
        f"{'':20}{'ms a token':>32}{'added ms a hop':>20}{'empty frame, a hop':>20}",
        f"{'':20}{'median':>12}{'least 10th':>11}{'p99':>9}" + f"{'median':>11}{'p99':>9}" * 2,
        f"{'one process':20}{_ms(result.plain_median, 12)}{_ms(result.plain_p10, 11)}"
        f"{_ms(result.plain_p99, 9)}",
    ]
    lines += [
        f"{_name(cost):20}{_ms(cost.token_median, 12)}{_ms(cost.token_p10, 11)}"
        f"{_ms(cost.token_p99, 9)}{_ms(cost.hop_median, 11)}{_ms(cost.hop_p99, 9)}"
        f"{_ms(cost.empty_median, 11)}{_ms(cost.empty_p99, 9)}"
        for cost in result.costs
    ]
    lines += [
        "",
        f"noise: the plain model's p99 is {_ms(result.plain_p99 - result.plain_median)} ms above "
        f"its median; its rounds spread by {result.spread:.0%}; load {result.load:.1f}",
    ]
    if result.spread > NOISY or result.load > result.cores:
        lines.append("This machine was busy with other work: take these numbers with care.")
    return "\n".join(lines)


def _name(cost: Cost) -> str:
    return f"{cost.stages} stages" + ("" if cost.prebuilt else ", off")


def _ms(seconds: float, width: int = 0) -> str:
    return f"{seconds * 1e3:{width}.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["10M", "125M"], default="10M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--off", action="store_true", help="measure without building ahead too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_llama(Path(folder), options.size)
        arrays: Any = tree_flatten(mlx_lm.load(str(path), lazy=True)[0].parameters())
        ways = (True, False) if options.off else (True,)
        rings = [Subject(count, way) for count in options.stages for way in ways]
        result = measure(path, rings, options.rounds, options.tokens)
    print(table(result, sum(array.size for _, array in arrays)))
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
