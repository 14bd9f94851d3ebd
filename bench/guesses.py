"""Gain of speculative decoding over two stages: tokens a second with it, against without.

    python -m bench.guesses [--only NAME ...] [--rounds N] [--json FILE]

The engine answers one user over stages in processes of their own, mTLS on, all on this machine.
Greedy; the same answer with and without, in turns, round by round, and the figure is the median
of the rounds' ratios.

- repeated: the demo model is asked for a story for the second time in a chat, with --lookup.
- new: it is asked for the first time, with --lookup: the cost of drafts that are rarely accepted.
- draft: the demo model drafts for itself: the cost of a draft model as large as the model.
- right, wrong: a llama of 10 million parameters, and drafts that cost nothing, all of them
  accepted, or all rejected: the largest gain, and the largest loss.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx_lm

import unicluster
from bench.lanes import Figures, show
from bench.models import write_llama
from node.generation.config import GenerationConfig
from node.generation.engine import GenerationEngine
from node.ring.compute_thread import MLXThread
from node.speculation.drafting import DraftModel, Lookup, Speculation
from node.weights.store import DEMO
from node.worker.__main__ import SWITCH_INTERVAL
from tests.support.tiny import VOCAB
from unicluster.v1.chat_pb2 import GenerateRequest
from unicluster.v1.node_pb2 import StageSpec

CONTEXT = 1024
MOST = 8
STORY = "Tell me a tiny story about a fox."
TOKENS = 120


class Bench:
    """A model over two stages, and a draft for it."""

    def __init__(self, model: Any, tokenizer: Any, draft: Any, thread: MLXThread) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.draft = draft
        self.thread = thread

    def chat(self, *said: str) -> list[int]:
        """A prompt of turns, the user's first."""
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        return list(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True))

    @asynccontextmanager
    async def engine(
        self, speculation: Speculation | None = None
    ) -> AsyncIterator[GenerationEngine]:
        engine = GenerationEngine(
            self.thread,
            self.tokenizer,
            GenerationConfig(
                StageSpec(context=CONTEXT, users=1), model_name="bench", speculation=speculation
            ),
        )
        await engine.set_model(self.model)
        yield engine
        engine.close()


async def compare(bench: Bench, prompt: list[int], speculation: Speculation) -> Figures:
    """Decodes one answer without and with drafts, which must not change it."""
    async with bench.engine() as engine:
        plain, expected = await timed(engine, prompt)
    async with bench.engine(speculation) as engine:
        guessing, found = await timed(engine, prompt)
        assert engine.scheduler is not None
        lane = engine.scheduler.lanes[0]
        meter = engine.scheduler.meter
        right = meter.accepted_tokens / max(meter.drafted_tokens, 1)
        each = lane.tokens / lane.steps
    if found != expected:
        raise RuntimeError("speculative decoding gave another answer")
    return {
        "tokens/s, without": plain,
        "with / without": guessing / plain,
        "guesses right": right,
        "tokens a step": each,
    }


async def timed(engine: GenerationEngine, prompt: list[int]) -> tuple[float, list[int]]:
    """Tokens a second, and the tokens."""
    ticket = await engine.submit(GenerateRequest(token_ids=prompt, max_tokens=TOKENS))
    times: list[float] = []
    tokens: list[int] = []
    async for event in ticket:
        if event.delta.token_ids:
            times.append(time.perf_counter())
            tokens += event.delta.token_ids
    return (len(times) - 1) / (times[-1] - times[0]), tokens


async def measure_repeated(bench: Bench) -> Figures:
    async with bench.engine() as engine:
        _, story = await timed(engine, bench.chat(STORY))
    told = bench.tokenizer.decode(story)
    return await compare(
        bench, bench.chat(STORY, told, STORY), Speculation(Lookup, MOST, free=True)
    )


async def measure_new(bench: Bench) -> Figures:
    return await compare(bench, bench.chat(STORY), Speculation(Lookup, MOST, free=True))


async def measure_draft(bench: Bench) -> Figures:
    drafter = partial(DraftModel, bench.draft, len(bench.tokenizer))
    return await compare(bench, bench.chat(STORY), Speculation(drafter, MOST))


class Told:
    """Guesses from a text that is known, each `wrong` by so much."""

    def __init__(self, text: list[int], wrong: int) -> None:
        self._text = text
        self._wrong = wrong

    def propose(self, tokens: list[int], count: int) -> list[int]:
        rest = self._text[len(tokens) : len(tokens) + count]
        return [(token + self._wrong) % VOCAB for token in rest]


async def measure_told(bench: Bench, wrong: int) -> Figures:
    prompt = list(range(1, 17))
    async with bench.engine() as engine:
        _, tokens = await timed(engine, prompt)
    told = Told([*prompt, *tokens], wrong)
    return await compare(bench, prompt, Speculation(lambda: told, MOST))


MEASURES: dict[str, Callable[[Bench], Awaitable[Figures]]] = {
    "repeated": measure_repeated,
    "new": measure_new,
    "draft": measure_draft,
    "right": partial(measure_told, wrong=0),
    "wrong": partial(measure_told, wrong=1),
}
OF_DEMO = {"repeated", "new", "draft"}


async def measure(names: list[str], rounds: int) -> dict[str, list[Figures]]:
    """The figures of each round, by measure."""
    thread = MLXThread()
    found: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for path, chosen in ((DEMO, OF_DEMO), (Path(folder) / "10M", MEASURES.keys() - OF_DEMO)):
            asked = [name for name in names if name in chosen]
            if not asked:
                continue
            if path != DEMO:
                write_llama(path)
            draft = (await thread.run(partial(mlx_lm.load, str(path))))[0]
            model, tokenizer = await thread.run(partial(unicluster.load, str(path), local_nodes=2))
            if path != DEMO:
                tokenizer.eos_token_ids = []
            with model:
                bench = Bench(model, tokenizer, draft, thread)
                for name in asked:
                    figures = found.setdefault(name, [])
                    for _ in range(rounds):
                        figures.append(await MEASURES[name](bench))
                        show(name, figures)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL)
    found = asyncio.run(measure(options.only, options.rounds))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.flush()
    os._exit(0)  # MLX aborts a process that ends while another thread has streams


if __name__ == "__main__":
    main()
