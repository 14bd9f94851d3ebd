"""Five hundred requests of all kinds over three stages: does each end rightly, and is nothing left?

    python -m bench.soak [--requests N] [--seed N] [--json FILE]

A tiny model on three agents behind `unicluster serve`, all real processes, mTLS on. Whole answers,
long and short prompts, chats that go on, answers cancelled while they wait, prefill or decode,
clients that vanish, deadlines that pass, requests that make no sense, and crowds larger than the
queue. Answers to some prompts are known from before and must come out the same each time. At the
end no cache may be left on any stage, once those kept for reuse are pushed out, and every process
may hold at most 3 % more memory than after the first fifty requests. Ends with exit code 1 where
that is not so.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from coordinator.fleet.local import inspect
from coordinator.planning.planner import Layout, least_memory
from tests.support.cluster import LocalCluster, ServeProgram, endless_model
from unicluster.client.answers import Delta, Finish
from unicluster.client.client import AsyncClient
from unicluster.errors import BusyError, InputError, NotFoundError, UnavailableError
from unicluster.v1.node_pb2 import InspectRequest

MACHINES = ("ann", "bob", "cat")
CONTEXT = 1024
USERS = 4
QUEUE = 4 * USERS  # as the engine has it
AT_ONCE = 10
SETTLED_AFTER = 50
GROWTH = 0.03
RESTS = 5
# Until what was cancelled is freed, and for one request.
DEADLINE = 60.0

KNOWN = [[(7 * i * i + 3 * k) % 200 + 1 for i in range(1 + 37 * k)] for k in range(6)]
KNOWN_TOKENS = 12

BAD: list[tuple[type[Exception], list[int], dict[str, Any]]] = [
    (InputError, [1] * CONTEXT, {}),
    (InputError, [1, 2, 3], {"max_tokens": CONTEXT}),
    (InputError, [1, 2, 3], {"max_tokens": 0}),
    (InputError, [1, 99_999], {}),
    (InputError, [1], {"temperature": -1}),
    (InputError, [1], {"top_p": 7}),
    (InputError, [1], {"stop": [""]}),
    (InputError, [1], {"logprobs": 10_000}),
    (NotFoundError, [1], {"model": "another"}),
]


class WrongEndError(Exception):
    """A request did not end as it should."""


class Soak:
    """The requests, each a method, and what came of them."""

    def __init__(self, server: ServeProgram, client: AsyncClient, seed: int) -> None:
        self.server = server
        self.client = client
        self.dice = random.Random(seed)
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._answers: dict[int, tuple[int, ...]] = {}
        self._kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (25, self.whole),
            (20, self.known),
            (12, self.chat),
            (12, self.cancelled),
            (6, self.unheard),
            (8, self.vanished),
            (5, self.late),
            (12, self.invalid),
        ]

    async def learn(self) -> None:
        """The answers to the known prompts, one by one."""
        for number, prompt in enumerate(KNOWN):
            answer = await self.client.chat(
                prompt, max_tokens=KNOWN_TOKENS, temperature=0, no_reuse=True
            )
            self._answers[number] = answer.token_ids

    async def run(self, count: int) -> None:
        """So many requests, up to AT_ONCE together, and with them one crowd."""
        places = asyncio.Semaphore(AT_ONCE)
        weights = [weight for weight, _ in self._kinds]
        crowd = min(2 * (QUEUE + USERS), count // 5)

        async def one() -> None:
            async with places:
                ((_, kind),) = self.dice.choices(self._kinds, weights)
                await self._judged(kind)

        await asyncio.gather(*(one() for _ in range(count - crowd)))
        await asyncio.gather(*(self._judged(self.crowding) for _ in range(crowd)))

    async def settled(self) -> None:
        """Evicts the prefix caches; returns once no other cache is left anywhere.

        Answers that take all the context there is do that, and what is left after them is the same,
        whatever was before.
        """
        prompt = [1] * (CONTEXT - KNOWN_TOKENS)
        ask = partial(self.client.chat, prompt, max_tokens=KNOWN_TOKENS, no_reuse=True)
        await asyncio.gather(*(ask() for _ in range(USERS)))
        end = time.monotonic() + DEADLINE
        while left := (await self.client.describe()).live_caches:
            if time.monotonic() > end:
                self.wrong.append(f"{left} caches are left on the stages")
                return
            await asyncio.sleep(0.05)

    async def _judged(self, kind: Callable[[], Awaitable[None]]) -> None:
        name = kind.__name__
        try:
            async with asyncio.timeout(DEADLINE):
                await kind()
        except Exception as error:
            self.wrong.append(f"{name}: {type(error).__name__}: {error}")
        self.ended[name] += 1

    def _prompt(self, longest: int = 400) -> list[int]:
        return [self.dice.randrange(1, 250) for _ in range(self.dice.randint(1, longest))]

    # Kinds of requests

    async def whole(self) -> None:
        prompt, tokens = self._prompt(), self.dice.randint(1, 40)
        answer = await self.client.chat(
            prompt, max_tokens=tokens, ignore_eos=True, temperature=self.dice.choice([0, 0.8])
        )
        expect(answer.finish_reason, "length")
        expect(len(answer.token_ids), tokens)
        expect(answer.usage.prompt_tokens, len(prompt))

    async def known(self) -> None:
        number = self.dice.randrange(len(KNOWN))
        answer = await self.client.chat(KNOWN[number], max_tokens=KNOWN_TOKENS, temperature=0)
        expect(answer.token_ids, self._answers[number])

    async def chat(self) -> None:
        history = self._prompt(100)
        for _ in range(3):
            answer = await self.client.chat(history, max_tokens=8, ignore_eos=True)
            expect(len(answer.token_ids), 8)
            history = [*history, *answer.token_ids, *self._prompt(20)]

    async def cancelled(self) -> None:
        """After some tokens."""
        heard = self.dice.randint(1, 8)
        events = self.client.stream(self._prompt(), max_tokens=500, ignore_eos=True)
        async for event in events:
            heard -= isinstance(event, Delta)
            if not heard:
                break
            if isinstance(event, Finish):
                raise WrongEndError("it was to be cancelled")
        await events.aclose()

    async def unheard(self) -> None:
        """Cancelled while it waits or prefills."""
        asking = asyncio.create_task(self.client.chat(self._prompt(900), max_tokens=100))
        await asyncio.wait([asking], timeout=self.dice.uniform(0, 0.1))
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking

    async def vanished(self) -> None:
        """The client's connection is closed in the middle of its answer."""
        begun = asyncio.Event()

        async def listen(client: AsyncClient) -> None:
            async for _ in client.stream(self._prompt(), max_tokens=500, ignore_eos=True):
                begun.set()

        client = self.server.async_client()
        listening = asyncio.create_task(listen(client))
        await begun.wait()
        await client.close()
        await asyncio.wait([listening], timeout=DEADLINE / 2)
        if not listening.done():
            raise WrongEndError("it went on without a connection")
        listening.cancelled() or listening.exception()

    async def late(self) -> None:
        """Its deadline passes."""
        try:
            await self.client.chat(
                self._prompt(), max_tokens=600, ignore_eos=True, deadline=self.dice.uniform(0.01, 1)
            )
        except UnavailableError as error:
            expect("deadline" in str(error).lower() or "in time" in str(error), True)

    async def invalid(self) -> None:
        kind, prompt, options = self.dice.choice(BAD)
        try:
            await self.client.chat(prompt, **options)
        except kind:
            return
        raise WrongEndError(f"{options} was not refused")

    async def crowding(self) -> None:
        """More than there is room for: refused at once, or answered."""
        try:
            answer = await self.client.chat(self._prompt(50), max_tokens=10, ignore_eos=True)
        except BusyError:
            self.ended["of them refused"] += 1
        else:
            expect(len(answer.token_ids), 10)


def expect(got: object, wanted: object) -> None:
    if got != wanted:
        raise WrongEndError(f"{got} instead of {wanted}")


def memory(cluster: LocalCluster, server: ServeProgram) -> dict[str, int]:
    """Resident bytes of each process."""
    found = {"serve": psutil.Process(server.pid).memory_info().rss}
    for name, agent in cluster.agents.items():
        found[f"agent {name}"] = psutil.Process(agent.pid).memory_info().rss
        found[f"worker {name}"] = agent.worker.memory_info().rss
    return found


async def memory_at_rest(
    soaking: Soak, cluster: LocalCluster, server: ServeProgram
) -> dict[str, int]:
    """The least of several rests: what is free but can't be given back differs between them."""
    found = []
    for _ in range(RESTS):
        await soaking.settled()
        found.append(memory(cluster, server))
    return {process: min(rest[process] for rest in found) for process in found[0]}


async def soak(folder: Path, requests: int, seed: int) -> dict[str, Any]:
    """Runs it; returns what is printed."""
    model = endless_model(folder / "llama")
    with LocalCluster(folder / "cluster") as cluster:
        request = InspectRequest(model=str(model), context=CONTEXT, users=USERS)
        layout = Layout.from_proto(await inspect(request))
        cluster.start_agents(*MACHINES, memory=least_memory(layout, len(MACHINES)))
        options = ("--context", str(CONTEXT), "--users", str(USERS))
        with cluster.serve(model, *options) as server:
            async with server.async_client() as client:
                soaking = Soak(server, client, seed)
                stages = len((await client.describe()).stages)
                await soaking.learn()
                begun = time.monotonic()
                await soaking.run(SETTLED_AFTER)
                before = await memory_at_rest(soaking, cluster, server)
                await soaking.run(requests - SETTLED_AFTER)
                seconds = time.monotonic() - begun
                kept = await client.describe()
                after = await memory_at_rest(soaking, cluster, server)
                info = await client.describe()
    for process, size in after.items():
        if size > before[process] * (1 + GROWTH):
            soaking.wrong.append(f"{process} grew by {size / before[process] - 1:.1%}")
    return {
        "stages": stages,
        "seconds": seconds,
        "requests": dict(sorted(soaking.ended.items())),
        "kept_caches": kept.kept_caches,
        "kept_bytes": kept.kept_bytes,
        "live_caches": info.live_caches,
        "memory": {process: [before[process], size] for process, size in after.items()},
        "wrong": soaking.wrong,
    }


def table(found: dict[str, Any]) -> str:
    """Results as a table."""
    lines = [f"{found['stages']} stages, {found['seconds']:.0f} s", ""]
    lines += [f"{name:16}{count:6}" for name, count in found["requests"].items()]
    lines += ["", f"{'resident MB':16}{f'after {SETTLED_AFTER}':>10}{'at the end':>12}"]
    for process, (before, after) in found["memory"].items():
        change = f"{after / before - 1:+.1%}"
        lines.append(f"{process:16}{before / 1e6:10.1f}{after / 1e6:12.1f}{change:>9}")
    lines += [
        "",
        f"prefix caches {found['kept_caches']}, caches left after their eviction "
        f"{found['live_caches']}",
        *(f"WRONG: {what}" for what in found["wrong"]),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(soak(Path(folder), options.requests, options.seed))
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
