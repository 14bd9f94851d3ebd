"""What a hop costs: decode over stages against one mlx-lm process, in the same run.

    python -m bench.hop [--rounds N] [--tokens N] [--stages 2 3] [--json FILE]

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
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

import unicluster
from bench.models import write_llama

Times = np.ndarray[Any, Any]

PROMPT_TOKENS = 32
WARM_UP = 20
NOISY = 0.1  # spread of the plain model's rounds, relative to their median


@dataclass(frozen=True)
class Cost:
    """Times in seconds."""

    stages: int
    token_median: float
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
    plain_p99: float
    spread: float  # between the quartiles of the plain model's rounds, relative to their median
    load: float  # processes that wanted a core, on average, over the last minute
    cores: int
    costs: list[Cost]


@contextmanager
def loaded(path: Path, stages: int) -> Iterator[Any]:
    """The model over that many stages; for 1, mlx-lm's own."""
    if stages == 1:
        yield mlx_lm.load(str(path))[0]
    else:
        with unicluster.load(str(path), local_nodes=stages)[0] as model:
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


def measure(path: Path, stages: Sequence[int], rounds: int, tokens: int) -> Result:
    """Decodes `rounds` times with each subject."""
    subjects = [1, *stages]
    found: dict[int, list[Times]] = {count: [] for count in subjects}
    empty: dict[int, list[Times]] = {count: [] for count in stages}
    for turn in range(rounds):
        first = turn % len(subjects)
        for count in subjects[first:] + subjects[:first]:
            with loaded(path, count) as model:
                found[count].append(decode(model, tokens))
                if count > 1:
                    empty[count].append(empty_hops(model, count, tokens))
        show_progress(turn + 1, rounds)
    plain = np.stack(found[1])
    medians = np.median(plain, axis=1)
    low, high = np.percentile(medians, [25, 75])
    return Result(
        rounds=rounds,
        tokens=tokens,
        plain_median=float(np.median(medians)),
        plain_p99=float(np.median(np.percentile(plain, 99, axis=1))),
        spread=float((high - low) / np.median(medians)),
        load=os.getloadavg()[0],
        cores=os.cpu_count() or 1,
        costs=[
            cost(count, np.stack(found[count]), medians, np.stack(empty[count])) for count in stages
        ],
    )


def cost(stages: int, times: Times, plain: Times, empty: Times) -> Cost:
    """`times` and `empty` have shape (rounds, tokens); `plain` is the median of each round."""
    medians = np.median(times, axis=1)
    tails = np.percentile(times, 99, axis=1)
    return Cost(
        stages=stages,
        token_median=float(np.median(medians)),
        token_p99=float(np.median(tails)),
        hop_median=float(np.median((medians - plain) / stages)),
        hop_p99=float(np.median((tails - plain) / stages)),
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
        f"{'':14}{'ms a token':>22}{'added ms a hop':>22}{'empty frame, a hop':>22}",
        f"{'':14}" + f"{'median':>12}{'p99':>10}" * 3,
        f"{'one process':14}{_ms(result.plain_median, 12)}{_ms(result.plain_p99, 10)}",
    ]
    lines += [
        f"{f'{cost.stages} stages':14}{_ms(cost.token_median, 12)}{_ms(cost.token_p99, 10)}"
        f"{_ms(cost.hop_median, 12)}{_ms(cost.hop_p99, 10)}"
        f"{_ms(cost.empty_median, 12)}{_ms(cost.empty_p99, 10)}"
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


def _ms(seconds: float, width: int = 0) -> str:
    return f"{seconds * 1e3:{width}.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_llama(Path(folder))
        arrays: Any = tree_flatten(mlx_lm.load(str(path), lazy=True)[0].parameters())
        result = measure(path, options.stages, options.rounds, options.tokens)
    print(table(result, sum(array.size for _, array in arrays)))
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
