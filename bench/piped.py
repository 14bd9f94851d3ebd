"""Speculation that fills the pipe: tokens a second against plain decode, every stage padded.

    python -m bench.piped [--stages S ...] [--right P ...] [--pad MS] [--rounds N] [--json FILE]

One user over S stages, each padded by a sleep, so that it shows on few cores which machines would
work at once: the head by the failpoint head.compute, the others, in processes of their own with
mTLS on, by stage.compute. Greedy; plain decode and piped decode in turns, and their texts must be
equal. An oracle guesses, each guess right with probability P, by a seed. Beside the speed-up stands
the formula n*S/(S+n-1) with n = 1/(1-P), P being the rate that the run had.

- oracle: a tiny llama, drafts that cost nothing, and one token a frame, as the formula has it.
- lookup, draft: the demo model, by what a chat has said before, and with itself as a draft.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx_lm
import numpy as np

from unicluster import failpoints

CONTEXT = 1024
TOKENS = 120
MOST = 8
STORY = "Tell me a tiny story about a fox."


class Oracle:
    """Guesses from a text that is known, each right with probability `right`."""

    def __init__(self, text: list[int], right: float, vocabulary: int) -> None:
        self._text = text
        self._vocabulary = vocabulary
        rng = np.random.default_rng(int(1000 * right))
        self._is_right = rng.random(len(text)) < right

    def propose(self, tokens: list[int], count: int, ahead: Sequence[int] = ()) -> list[int]:
        start = len(tokens) + len(ahead)
        places = range(start, min(start + count, len(self._text)))
        return [
            self._text[at] if self._is_right[at] else (self._text[at] + 1) % self._vocabulary
            for at in places
        ]


def formula(stages: int, rate: float) -> float:
    """Speed-up of a pipe of equal stages whose guesses are right at this rate."""
    if rate >= 1:
        return float(stages)
    tokens = 1 / (1 - rate)
    return tokens * stages / (stages + tokens - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--right", nargs="+", type=float, default=[0.6, 0.8, 0.9])
    parser.add_argument("--pad", type=int, default=20, help="milliseconds a stage")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--real", action="store_true", help="lookup and draft, of the demo model")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    point = f"=delay({options.pad})"
    os.environ[failpoints.VARIABLE] = f"head.compute{point};stage.compute{point}"
    # In this process there is no stage but the head.
    failpoints._points = failpoints.parse(f"head.compute{point}")
    found = asyncio.run(_measure(options))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.flush()
    os._exit(0)  # MLX aborts a process that ends while another thread has streams


async def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    import unicluster
    from bench.guesses import DEMO, SWITCH_INTERVAL, Bench, MLXThread, timed
    from node.speculation.drafting import DraftModel, Lookup, Speculation
    from tests.support.tiny import tiny_config, write_model

    sys.setswitchinterval(SWITCH_INTERVAL)
    logging.disable(logging.WARNING)  # each padded frame would be one
    thread = MLXThread()
    found: list[dict[str, Any]] = []

    async def compare(bench: Bench, name: str, prompt: list[int], speculation: Speculation) -> None:
        stages = bench.model.stages
        ratios, rates = [], []
        for _ in range(options.rounds):
            async with bench.engine() as engine:
                await timed(engine, prompt)
                plain, expected = await timed(engine, prompt)
            async with bench.engine(speculation) as engine:
                fast, got = await timed(engine, prompt)
                assert engine.scheduler is not None
                meter = engine.scheduler.meter
            if got != expected:
                raise RuntimeError("piped decode gave another text")
            rejected = _rejections(speculation, len(prompt), len(got), meter)
            rates.append(1 - rejected / len(got))
            ratios.append(fast / plain)
        ratio, rate = median(ratios), median(rates)
        accepted = meter.accepted_tokens / max(meter.drafted_tokens, 1)
        line = {
            "name": name,
            "stages": stages,
            "plain": plain,
            "speed-up": ratio,
            "rate": rate,
            "formula": formula(stages, rate),
            "of formula": ratio / formula(stages, rate),
            "accepted of sent": accepted,
        }
        found.append(line)
        print(
            f"S={stages} {name:12} plain {plain:6.1f} tokens/s  speed-up {ratio:5.2f}  "
            f"rate {rate:4.2f}  formula {line['formula']:4.2f}  {line['of formula']:4.0%}  "
            f"of guesses sent {accepted:4.0%} right",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        tiny = write_model(Path(folder) / "tiny", tiny_config("llama"))
        for stages in options.stages:
            path = DEMO if options.real else tiny
            loaded = await thread.run(partial(unicluster.load, str(path), local_nodes=stages))
            model, tokenizer = loaded
            with model:
                if options.real:
                    draft = (await thread.run(partial(mlx_lm.load, str(path))))[0]
                    bench = Bench(model, tokenizer, draft, thread)
                    async with bench.engine() as engine:
                        _, story = await timed(engine, bench.chat(STORY))
                    again = bench.chat(STORY, tokenizer.decode(story), STORY)
                    lookup = Speculation(Lookup, MOST, piped=True, free=True)
                    drafter = partial(DraftModel, draft, len(tokenizer))
                    await compare(bench, "lookup again", again, lookup)
                    await compare(bench, "lookup new", bench.chat(STORY), lookup)
                    await compare(
                        bench,
                        "own draft",
                        bench.chat(STORY),
                        Speculation(drafter, MOST, piped=True),
                    )
                    continue
                tokenizer.eos_token_ids = []
                bench = Bench(model, tokenizer, None, thread)
                prompt = list(range(1, 17))
                async with bench.engine() as engine:
                    _, text = await timed(engine, prompt)
                for right in options.right:
                    oracle = Oracle([*prompt, *text], right, len(tokenizer))
                    await compare(
                        bench,
                        f"oracle {right}",
                        prompt,
                        Speculation(lambda o=oracle: o, 1, piped=True),  # type: ignore[misc]
                    )
    return found


def _rejections(speculation: Any, start: int, count: int, meter: Any) -> float:
    """Tokens of the text whose guess was wrong, or that had none."""
    drafter = speculation.drafter()
    if isinstance(drafter, Oracle):
        return float((~drafter._is_right[start : start + count]).sum())
    return max(count - meter.accepted_tokens, 0)


if __name__ == "__main__":
    main()
