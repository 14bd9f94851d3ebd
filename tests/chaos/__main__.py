"""Faults at random times while answers of all kinds stream: is each the one that it should be?

    python -m tests.chaos [--faults N] [--seed N] [--minutes N] [--json FILE]

A tiny model on five agents behind `unicluster serve`, real processes, mTLS on; some machines are
more than are needed. Every answer is known from before the first fault. With faults beneath it, an
answer must come out the same, or end with a typed error after a part of it that is right. Ends with
exit code 1 if any text is wrong, repeated or cut off, any stream stands still, or any cache, worker
or file descriptor is left at the end.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from coordinator.fleet.local import inspect
from coordinator.planning.planner import Layout, least_memory
from tests.chaos.answers import Heard, Request, hear, requests, with_stop, wrong
from tests.chaos.faults import Faults
from tests.support.cluster import LocalCluster, ServeProgram, endless_model
from tests.support.deadlines import scaled
from unicluster.client.client import AsyncClient
from unicluster.cluster.channels import split_address
from unicluster.deadlines import VARIABLE
from unicluster.errors import UniclusterError
from unicluster.v1.node_pb2 import InspectRequest

MACHINES = ("ann", "bob", "cat", "dan", "eve")
# As few as hold the model: two may be gone, and it still fits.
STAGES = 3
CONTEXT = 2048
USERS = 4
AT_ONCE = 4
# Seconds without progress after which a process counts as stuck, on an idle machine.
FROZEN = 2.0
# Longest that a stream may be silent: faults may follow each other.
SILENCE = 60.0
# Between two faults; with this chance there is no pause at all.
PAUSE, AT_ONCE_CHANCE = (0.1, 1.0), 0.1
# Open files that a process may have more of at the end: connections to machines that came back.
MORE_FILES = 25


class Chaos:
    """Answers that are asked for again and again, and what came of each."""

    def __init__(self, client: AsyncClient, dice: random.Random) -> None:
        self.client = client
        self.ended: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.gaps: list[float] = []
        self._dice = dice
        self._known: list[tuple[Request, Heard]] = []
        self._calm = 0.0
        self._moved = asyncio.Event()
        self._over = asyncio.Event()

    async def learn(self) -> None:
        """The answers to all requests, one by one."""
        for request in requests(self._dice):
            await self._learn(request)
        await self._learn(with_stop(*self._known[0]))

    async def _learn(self, request: Request) -> None:
        heard = await hear(self.client, request, scaled(SILENCE))
        if heard.error is not None:
            raise heard.error
        self._calm = max(self._calm, heard.gap)
        self._known.append((request, heard))

    async def ask_until(self, work: asyncio.Task[None]) -> None:
        """Asks AT_ONCE requests at a time until the work is done."""
        work.add_done_callback(lambda _: self._over.set())
        await asyncio.gather(work, *(self._ask() for _ in range(AT_ONCE)))

    async def moving(self, most: float) -> None:
        """Returns when a piece of any answer has come, or after so many seconds."""
        self._moved.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._moved.wait(), most)

    async def _ask(self) -> None:
        while not self._over.is_set():
            request, known = self._dice.choice(self._known)
            try:
                heard = await hear(self.client, request, scaled(SILENCE), self._moved.set)
            except TimeoutError:
                self._is_wrong(request, f"nothing came for {scaled(SILENCE):.0f} s")
                continue
            if heard.gap > 2 * self._calm:
                self.gaps.append(heard.gap)
            if what := wrong(heard, known):
                self._is_wrong(request, what)
            elif heard.error is None:
                self.ended["whole and right"] += 1
            else:
                self.ended[
                    "a typed error after a right part" if heard.token_ids else "refused"
                ] += 1
                self.errors[f"{type(heard.error).__name__}: {heard.error}"] += 1
                await asyncio.sleep(0.2)

    def _is_wrong(self, request: Request, what: str) -> None:
        self.ended["wrong"] += 1
        self.wrong.append(f"{request.name}: {what}")
        print(f"WRONG: {self.wrong[-1]}", flush=True)


async def strike(faults: Faults, run: Chaos, count: int, until: float, dice: random.Random) -> None:
    """So many faults, or as many as there is time for; most fall into answers that go on."""
    for _ in range(count):
        if time.monotonic() > until:
            break
        await faults.strike()
        if dice.random() > AT_ONCE_CHANCE:
            await run.moving(SILENCE / 2)
            await asyncio.sleep(dice.uniform(*PAUSE))
    await faults.healed()


async def at_rest(client: AsyncClient, faults: Faults) -> dict[str, int]:
    """Waits until it answers again and nothing is live. The caches that are left, and stages."""
    end = time.monotonic() + scaled(SILENCE)
    while True:
        try:
            await client.chat("hello", max_tokens=4, temperature=0)
            info = await client.describe()
            if not info.live_caches or time.monotonic() > end:
                return {"live_caches": info.live_caches, "stages": len(info.stages)}
        except UniclusterError:
            if time.monotonic() > end:
                print(faults.server.out, faults.server.err, sep="\n")
                raise
        await asyncio.sleep(0.1)


async def chaos(folder: Path, count: int, seed: int, minutes: float) -> dict[str, Any]:
    """Runs it; returns what is printed."""
    dice = random.Random(seed)
    model = endless_model(folder / "llama")
    request = InspectRequest(model=str(model), context=CONTEXT, users=USERS)
    memory = least_memory(Layout.from_proto(await inspect(request)), STAGES)
    frozen = scaled(FROZEN)
    with LocalCluster(folder / "cluster", **{VARIABLE: str(frozen)}) as cluster:
        cluster.start_agents(*MACHINES, memory=memory)
        port = ["0"]

        def serve() -> ServeProgram:
            options = ("--context", str(CONTEXT), "--users", str(USERS), "--grpc-port", port[0])
            return cluster.serve(model, *options)

        faults = Faults(cluster, serve, memory, frozen, dice)
        address = faults.server.address
        port[0] = str(split_address(address)[1])
        async with AsyncClient(address, cluster=cluster.cluster) as client:
            run = Chaos(client, dice)
            await run.learn()
            begun = time.monotonic()
            supervision = asyncio.create_task(faults.supervise())
            work = strike(faults, run, count, begun + 60 * minutes, dice)
            await run.ask_until(asyncio.create_task(work))
            seconds = time.monotonic() - begun
            rest = await at_rest(client, faults)
            supervision.cancel()
            left = [psutil.Process(p.pid) for p in (faults.server, *cluster.agents.values())]
            files = {process.pid: process.num_fds() for process in left}
            workers = len(cluster.workers())
            before = faults.server.describe().live_caches
    if rest["live_caches"] or before:
        run.wrong.append(f"{rest['live_caches']} caches are left on the stages")
    if workers != rest["stages"]:
        run.wrong.append(f"{workers} workers are left for {rest['stages']} stages")
    return {
        "seconds": seconds,
        "faults": dict(faults.struck),
        "answers": dict(run.ended),
        "errors": dict(run.errors),
        "gaps": sorted(run.gaps),
        "open_files": max(files.values()),
        "gave_up": faults.gave_up,
        "wrong": run.wrong,
    }


def table(found: dict[str, Any]) -> str:
    """Results as a table."""
    total = sum(found["faults"].values())
    lines = [f"{total} faults in {found['seconds']:.0f} s", ""]
    lines += [f"  {name:34}{count:6}" for name, count in sorted(found["faults"].items())]
    lines += ["", f"{sum(found['answers'].values())} answers", ""]
    lines += [f"  {name:34}{count:6}" for name, count in sorted(found["answers"].items())]
    if gaps := found["gaps"]:
        half, most = statistics.median(gaps), gaps[-1]
        late = gaps[int(0.9 * (len(gaps) - 1))]
        lines += ["", f"longest silence of {len(gaps)} disturbed answers: median {half:.1f} s, "
                  f"9 of 10 below {late:.1f} s, at most {most:.1f} s"]  # fmt: skip
    lines += ["", *(f"  {n:4} x {text}" for text, n in Counter(found["errors"]).most_common(12))]
    lines += [f"serve gave up, and was started anew: {words}" for words in found["gave_up"]]
    lines += [f"WRONG: {what}" for what in found["wrong"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=6.0, help="no fault after that")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(chaos(Path(folder), options.faults, options.seed, options.minutes))
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
