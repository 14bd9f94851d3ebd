"""Whether all machines are kept busy: users, prompts and turns over two stages.

    python -m bench.lanes [--size 10M 125M] [--rounds N] [--only NAME ...] [--json FILE]

The engine answers over stages in processes of their own, mTLS on, all on this machine. Greedy,
prompts of exact lengths, nothing stops at an end token, and no prompt is reused but where reuse
is measured (unicluster/benchmark/measure.py). What is compared runs in the same process, in
turns, round by round, and the figure is the median of the rounds' ratios.

- users: tokens a second of 2 and 4 users together, against those of 1 user.
- prefill: seconds to the first token of 512 tokens, one chunk on its way at a time against as
  many as there are stages.
- turns: seconds to the first token of a chat's second turn, against those of its first, of 2048.
- gap: the longest time between two tokens of an answer while 4096 tokens of another are
  prefilled, against the time of a chunk: that of the prefill over the number of chunks.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import unicluster
from bench.models import write_llama
from node.generation.config import GenerationConfig
from node.generation.engine import GenerationEngine
from node.ring.compute_thread import MLXThread
from node.ring.ring import PrefillWindow
from node.worker.__main__ import SWITCH_INTERVAL
from unicluster.benchmark import measure
from unicluster.v1.chat_pb2 import GenerateRequest
from unicluster.v1.node_pb2 import StageSpec

STAGES = 2
CONTEXT = 8192
TOKENS = {"10M": 120, "125M": 40}  # of an answer, while users are counted
PROMPT = 512
WARM_UP = 2
TURN = 2048
LONG = 4096

Figures = dict[str, float]


class Bench:
    """A model over stages, and engines over it."""

    def __init__(self, size: str, model: Any, tokenizer: Any, thread: MLXThread) -> None:
        self.size = size
        self.model = model
        self.tokenizer = tokenizer
        self.thread = thread

    @asynccontextmanager
    async def engine(self, users: int, kv_bytes: int = 0) -> AsyncIterator[GenerationEngine]:
        """Finished caches are kept for reuse only with `kv_bytes`."""
        engine = GenerationEngine(
            self.thread,
            self.tokenizer,
            GenerationConfig(
                StageSpec(context=CONTEXT, users=users, kv_bytes=kv_bytes), model_name=self.size
            ),
        )
        await engine.set_model(self.model)
        yield engine
        engine.close()


def of_engine(engine: GenerationEngine) -> measure.Ask:
    """Asks an engine, without any network."""

    async def ask(
        prompt: Sequence[int], tokens: int, *, reuse: bool = False
    ) -> AsyncGenerator[Sequence[int], None]:
        request = GenerateRequest(
            token_ids=prompt, max_tokens=tokens, ignore_eos=True, no_reuse=not reuse
        )
        ticket = await engine.submit(request)
        try:
            async for event in ticket:
                if event.delta.token_ids:
                    yield event.delta.token_ids
        finally:
            ticket.cancel()

    return ask


async def measure_users(bench: Bench) -> Figures:
    tokens = TOKENS[bench.size]
    async with bench.engine(4) as engine:
        ask = of_engine(engine)
        one, two, four = [await measure.speed(ask, users, tokens) for users in (1, 2, 4)]
    return {"tokens/s of 1": one, "2 users / 1": two / one, "4 users / 1": four / one}


async def measure_prefill(bench: Bench) -> Figures:
    async with bench.engine(1) as engine:
        for _ in range(WARM_UP):  # the first prompts tell what a chunk costs, and how large to cut
            await measure.first_token(of_engine(engine), PROMPT)
        on = await measure.first_token(of_engine(engine), PROMPT)
        usual, bench.model.prefill_window = bench.model.prefill_window, PrefillWindow(1)
        off = await measure.first_token(of_engine(engine), PROMPT)
        bench.model.prefill_window = usual
    return {"s, pipelined": on, "faster than without": off / on}


async def measure_turns(bench: Bench) -> Figures:
    async with bench.engine(1, kv_bytes=2**31) as engine:
        first, second = await measure.turns(of_engine(engine), TURN)
    return {"s, first turn": first, "second / first": second / first}


async def measure_gap(bench: Bench) -> Figures:
    async with bench.engine(2) as engine:
        assert engine.scheduler is not None
        found = await measure.gap(of_engine(engine), LONG, CONTEXT - measure.SHORT)
        chunk = found.prefill_s / engine.scheduler.chunks
    return {
        "s, chunk": chunk,
        "longest gap / chunk": found.longest_s / chunk,
        "s, prefill": found.prefill_s,
    }


MEASURES: dict[str, Callable[[Bench], Awaitable[Figures]]] = {
    "users": measure_users,
    "prefill": measure_prefill,
    "turns": measure_turns,
    "gap": measure_gap,
}


async def measure_all(sizes: list[str], names: list[str], rounds: int) -> dict[str, list[Figures]]:
    """The figures of each round, by measure and size."""
    thread = MLXThread()
    found: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = str(write_llama(Path(folder) / size, size))
            model, tokenizer = await thread.run(partial(unicluster.load, path, local_nodes=STAGES))
            tokenizer.eos_token_ids = []
            with model:
                bench = Bench(size, model, tokenizer, thread)
                for name in names:
                    figures = found.setdefault(f"{name}, {size}", [])
                    for _ in range(rounds):
                        figures.append(await MEASURES[name](bench))
                        show(f"{name}, {size}", figures)
    return found


def show(name: str, rounds: list[Figures]) -> None:
    """Medians so far, and the range of the rounds."""
    for figure in rounds[0]:
        values = [figures[figure] for figures in rounds]
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{name:16} {figure:24} {median(values):9.3f}   {spread}, {len(values)} rounds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL)
    found = asyncio.run(measure_all(options.size, options.only, options.rounds))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.flush()
    os._exit(0)  # MLX aborts a process that ends while another thread has streams


if __name__ == "__main__":
    main()
