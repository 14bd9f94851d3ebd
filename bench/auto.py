"""Speculation by default, against none: `python -m bench.auto`.

    python -m bench.auto [--engine ENGINE] [--stages 2 3] [--pad MS] [--rounds N] [--text T ...]

A model is served twice over agents here, with `--speculate off` and with what is the default (or
--speculate WHAT), and both are asked the same through the gRPC door, in turns: the ratio is that of
their tokens a second, the median of the rounds. Greedy, and the texts are compared. ggml is
SmolLM2-135M-Instruct as a GGUF, mlx its weights in float32, demo the bundled model.

- new: another story each round; again: a story for the second time in a chat; edit: a function is
  to be written again with one name changed; users: two stories at once.

--pad: each stage sleeps so many milliseconds a frame, so that few cores show which machines would
work at once; without it guesses take the time of the cores that everything shares.
"""

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Any

from bench.subjects import CONTEXT, MEMORY, STARTED
from node.weights.store import DEMO
from tests.support.cluster import LocalCluster
from tests.support.real_model import MISSING, gguf_file, safetensors_folder
from unicluster import failpoints
from unicluster.client.client import AsyncClient

THINGS = ("fox", "river", "lamp", "snail", "clock", "storm", "bridge", "robot", "king", "cake")
CODE = """def total_price(items, tax):
    total = 0.0
    for item in items:
        price = item.price * item.count
        if item.discount:
            price = price - item.discount
        total = total + price
    total = total + total * tax
    return round(total, 2)
"""
DEMO_MEMORY = {2: "1MB", 3: "600KB"}
Said = list[dict[str, str]]


def said(*texts: str) -> Said:
    """A chat of turns, the user's first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


async def speed(client: AsyncClient, tokens: int, *chats: Said) -> tuple[float, list[list[int]]]:
    """Tokens a second of answers at once, from their first tokens on, and their token ids."""

    async def answer(chat: Said) -> tuple[list[float], list[int]]:
        at: list[float] = []
        ids: list[int] = []
        options: Any = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        async for event in client.stream(chat, **options, no_reuse=True):
            if new := getattr(event, "token_ids", ()):
                at += [time.perf_counter()] * len(new)
                ids += new
        return at, ids

    answers = await asyncio.gather(*map(answer, chats))
    begin, end = min(at[0] for at, _ in answers), max(at[-1] for at, _ in answers)
    return sum(len(ids) - 1 for _, ids in answers) / (end - begin), [ids for _, ids in answers]


@contextlib.asynccontextmanager
async def served(
    folder: Path, args: argparse.Namespace, stages: int, speculate: str
) -> AsyncIterator[AsyncClient]:
    """A deployment with that option of --speculate."""
    pad = f"=delay({args.pad})"
    padded = {failpoints.VARIABLE: f"head.compute{pad};stage.compute{pad}"} if args.pad else {}
    if args.engine == "demo":
        model, memory = DEMO, DEMO_MEMORY[stages]
    else:
        file = gguf_file()
        if file is None:
            raise SystemExit(MISSING)
        model = file if args.engine == "ggml" else safetensors_folder(file)
        memory = MEMORY[args.engine][stages]
    with LocalCluster(folder, **padded) as cluster:
        names = [f"machine-{number}" for number in range(stages)]
        await asyncio.to_thread(cluster.start_agents, *names, memory=memory)
        context = "1024" if args.engine == "demo" else CONTEXT
        server = cluster.serve(model, "--context", context, "--speculate", speculate)
        await asyncio.to_thread(server.wait_for, "Ctrl-C unloads", STARTED)
        if (loaded := len(server.describe().stages)) != stages:
            raise SystemExit(f"{stages} machines were to have a stage, and {loaded} have")
        async with server.async_client() as client:
            yield client


async def measure(args: argparse.Namespace, stages: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(served(Path(folder) / what, args, stages, what))
                for what in ("off", args.speculate)
            ]
            plain = clients[0]
            story, code = "Tell me a tiny story about a {}.", f"Here is a function:\n\n{CODE}\n"
            code += "Write the whole function again, but call it total_cost. Only the code."
            first = said(story.format("fox"))
            answer = await plain.chat(first, max_tokens=args.tokens, temperature=0)
            again = said(story.format("fox"), answer.text, "Tell me the same story again.")
            chats = {"again": [again], "edit": [said(code)]}
            found: dict[str, list[tuple[float, float, bool]]] = {}
            for number in range(-args.warm_up, args.rounds):
                thing, other = (THINGS[(number + more) % len(THINGS)] for more in (0, 5))
                news = [said(story.format(thing)), said(story.format(other))]
                for name, asked in {"new": news[:1], **chats, "users": news}.items():
                    if name not in args.text:
                        continue
                    order = [0, 1] if number % 2 else [1, 0]
                    got = {}
                    for which in order:
                        got[which] = await speed(clients[which], args.tokens, *asked)
                    if number >= 0:
                        same = got[0][1] == got[1][1]
                        found.setdefault(name, []).append((got[0][0], got[1][0] / got[0][0], same))
            metrics = await clients[1].measure()
    for name, rounds in found.items():
        ratios = sorted(ratio for _, ratio, _ in rounds)
        print(
            f"{args.engine} S={stages} pad {args.pad} {name:6} "
            f"off {median(plain for plain, _, _ in rounds):6.1f} tokens/s  "
            f"{args.speculate} {median(ratios):5.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})  "
            f"{sum(same for _, _, same in rounds)} of {len(rounds)} texts equal",
            flush=True,
        )
    print(
        f"guesses {metrics.drafted_tokens}, right {metrics.accepted_tokens}; "
        f"{metrics.speculation}; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("ggml", "mlx", "demo"), default="ggml")
    parser.add_argument("--stages", type=int, nargs="+", default=[2], choices=(2, 3))
    parser.add_argument("--speculate", default="auto")
    parser.add_argument("--pad", type=int, default=0, help="milliseconds a frame")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=80)
    texts = ["new", "again", "edit", "users"]
    parser.add_argument("--text", nargs="+", choices=texts, default=texts)
    args = parser.parse_args()
    for stages in args.stages:
        asyncio.run(measure(args, stages))


if __name__ == "__main__":
    main()
