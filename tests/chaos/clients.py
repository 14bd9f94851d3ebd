"""Clients that ask for known answers again and again, and what came of each."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields

from tests.chaos.answers import Heard, Request, hear, requests, with_stop, wrong
from tests.support.deadlines import scaled
from unicluster.client.client import AsyncClient
from unicluster.client.metrics import Recoveries
from unicluster.errors import UniclusterError

AT_ONCE = 2
# Longest that a stream may be silent: faults may follow each other.
SILENCE = 60.0
# Longest that the model may be away before a client asks all the same.
AWAY = 60.0
LOOK_SECONDS = 0.1
PARTS = ("detect_s", "plan_s", "load_s", "replay_s")


class Clients:
    """Requests, and their outcomes.

    Like a client that looks before it asks, each waits until the model is served. `ended` counts
    requests by how they ended, `refused` those that came while it was not served after all.
    on_stages: gets the machines that serve it, the head first. note: takes, in a line, each long
    silence and each recovery.
    """

    def __init__(
        self,
        clients: Sequence[AsyncClient],
        dice: random.Random,
        on_stages: Callable[[tuple[str, ...]], None],
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.clients = clients
        self.client = clients[0]  # that looks
        self._on_stages = on_stages
        self._note = note
        self.ended: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.refused = 0
        self.wrong: list[str] = []
        self.gaps: list[float] = []
        self.parts: dict[str, list[float]] = {part: [] for part in PARTS}
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
        """Asks AT_ONCE requests of each client at a time until the work is done."""
        work.add_done_callback(lambda _: self._over.set())
        recoveries = asyncio.create_task(self._note_recoveries())
        asking = (self._ask(client) for client in self.clients for _ in range(AT_ONCE))
        await asyncio.gather(work, *asking)
        recoveries.cancel()

    async def moving(self, until: float) -> None:
        """Returns when a piece of any answer has come, or at that time by the monotonic clock."""
        self._moved.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._moved.wait(), max(until - time.monotonic(), 0))

    async def _ask(self, client: AsyncClient) -> None:
        while not self._over.is_set():
            await self._served()
            if self._over.is_set():
                return
            request, known = self._dice.choice(self._known)
            try:
                heard = await hear(client, request, scaled(SILENCE), self._moved.set)
            except TimeoutError:
                self._is_wrong(request, f"nothing came for {scaled(SILENCE):.0f} s")
                continue
            if heard.gap > 2 * self._calm:
                self.gaps.append(heard.gap)
                self._note(f"{request.name}: an answer ended that was silent for {heard.gap:.1f} s")
            if what := wrong(heard, known):
                self._is_wrong(request, what)
            elif heard.error is None:
                self.ended["whole and right"] += 1
            elif heard.token_ids:
                self.ended["a typed error after a right part"] += 1
                self.errors[f"{type(heard.error).__name__}: {heard.error}"] += 1
            else:
                self.refused += 1
                self.errors[f"refused: {type(heard.error).__name__}: {heard.error}"] += 1
                await asyncio.sleep(LOOK_SECONDS)

    async def _served(self) -> None:
        """Returns when the model is served, as `serve` says, or after AWAY."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(scaled(AWAY)):
                while not self._over.is_set():
                    with contextlib.suppress(UniclusterError):
                        info = await self.client.describe()
                        if info.state == "ready":
                            self._on_stages(tuple(stage.node for stage in info.stages))
                            return
                    await asyncio.sleep(LOOK_SECONDS)

    async def _note_recoveries(self) -> None:
        """The parts of each recovery, from the counters of `serve`, which begin with it."""
        before = Recoveries()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                now = (await self.client.measure()).recoveries
            except UniclusterError:
                continue
            if any(getattr(now, f.name) < getattr(before, f.name) for f in fields(now)):
                before = Recoveries()
            if more := now.resumed - before.resumed:
                took = {part: getattr(now, part) - getattr(before, part) for part in PARTS}
                said = ", ".join(f"{part} {each / more:.1f}" for part, each in took.items())
                self._note(f"{more} answers go on: {said}")
                for part in PARTS:
                    self.parts[part] += [took[part] / more] * more
            before = now

    def _is_wrong(self, request: Request, what: str) -> None:
        self.ended["wrong"] += 1
        self.wrong.append(f"{request.name}: {what}")
        self._note(f"WRONG: {self.wrong[-1]}")
        print(f"WRONG: {self.wrong[-1]}", flush=True)
