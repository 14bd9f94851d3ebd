"""Predictions of the simulation for real stages on this machine, beside measurements."""

import os
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import unicluster
from bench import simulation
from bench.lanes import of_engine
from bench.models import write_llama
from bench.simulation import Cluster, StageCost
from coordinator.planning.links import Link
from node.generation.config import GenerationConfig
from node.generation.engine import GenerationEngine
from node.metering.trips import Trip, Trips
from node.pipeline.pipeline_model import PUSHED_TOKENS
from node.ring.compute_thread import MLXThread
from node.ring.ring import PrefillWindow
from unicluster.benchmark import measure
from unicluster.v1.node_pb2 import StageSpec

TOKENS = 32
PROMPT = 256
CONTEXT = 2048
FRAMES = 30
ONE_CHUNK = f"prefill of {PROMPT}, one chunk at a time, s"
PIPELINED = f"prefill of {PROMPT}, pipelined, s"

Shape = tuple[int, int]  # answers, tokens of each


class Reported(Trips):
    """Trips that also say to `heard` what each came back with."""

    def __init__(self, machines: Sequence[str], heard: Callable[[Trip], None]) -> None:
        super().__init__(machines)
        self._heard = heard

    def note(self, trip: Trip) -> None:
        super().note(trip)
        self._heard(trip)


class Watched:
    """A pipeline model, and what each stage took for each shape of input."""

    def __init__(self, model: Any) -> None:
        self.seconds: dict[int, dict[Shape, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._model = model
        self._sent: deque[Shape] = deque()

    def __call__(self, inputs: Any, cache: Any = None, **more: Any) -> Any:
        self._sent.append(inputs.shape)
        window = self._model.prefill_window
        begun = time.perf_counter() - window.waited
        logits = self._model(inputs, cache=cache, **more)
        self.seconds[0][inputs.shape].append(time.perf_counter() - window.waited - begun)
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @contextmanager
    def reports(self) -> Iterator[None]:
        """Records the times that the other stages report while the block runs."""
        usual = self._model.trips
        self._model.trips = Reported(usual.machines, self._note)
        try:
            yield
        finally:
            self._model.trips = usual
            self._sent.clear()

    def _note(self, trip: Trip) -> None:
        shape = self._sent.popleft()  # frames come back in the order in which they left
        for report in trip.reports:
            self.seconds[report.stage][shape].append(report.compute_s)


class Real:
    """Stages on this machine."""

    def __init__(self, thread: MLXThread, model: Any, tokenizer: Any) -> None:
        self.model = model
        self._thread = thread
        self._tokenizer = tokenizer

    @contextmanager
    def window(self, places: int) -> Iterator[None]:
        usual, self.model.prefill_window = self.model.prefill_window, PrefillWindow(places)
        yield
        self.model.prefill_window = usual

    async def engine(self, model: Any, users: int, lanes: int) -> GenerationEngine:
        engine = GenerationEngine(
            self._thread,
            self._tokenizer,
            GenerationConfig(
                StageSpec(context=CONTEXT, users=users, lanes=lanes), model_name="10M"
            ),
        )
        await engine.set_model(model)
        return engine

    async def speed(self, users: int, lanes: int, model: Any = None) -> float:
        engine = await self.engine(model or self.model, users, lanes)
        found = await measure.speed(of_engine(engine), users, TOKENS)
        engine.close()
        return found

    async def first_token(self, model: Any = None) -> float:
        engine = await self.engine(model or self.model, 1, 1)
        await measure.first_token(of_engine(engine), PROMPT)  # which sets the pace
        found = await measure.first_token(of_engine(engine), PROMPT)
        engine.close()
        return found

    async def hop(self) -> float:
        """Seconds of one, with a frame that asks for no computing."""
        remote = self.model.stages - 1
        found = []
        for _ in range(FRAMES):
            begun = time.perf_counter()
            await self._thread.run(self.model.live_caches)
            found.append((time.perf_counter() - begun) / remote / self.model.stages)
        return median(found)


async def compared(rounds: int) -> dict[str, Any]:
    """Measured and simulated, for two and three stages."""
    thread, rows = MLXThread(), []
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_llama(Path(folder)))
        for stages in (2, 3):
            model, tokenizer = await thread.run(partial(unicluster.load, path, local_nodes=stages))
            with model:
                rows += await _rows(Real(thread, model, tokenizer), rounds)
    return {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "rounds": rounds,
        "rows": rows,
    }


async def _rows(real: Real, rounds: int) -> list[dict[str, Any]]:
    stages = real.model.stages
    watched = Watched(real.model)
    alone, hops = [], []
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        print(f"{stages} stages, round {number + 1} of {rounds}", file=sys.stderr)
        with watched.reports():
            alone.append(1 / await real.speed(1, 1, watched))
            await real.speed(2, 1, watched)
            with real.window(1):
                found[ONE_CHUNK].append(await real.first_token(watched))
        hops.append(await real.hop())
        for users in (1, 2, 4):
            found[f"{users} users, tokens/s"].append(await real.speed(users, stages))
        found[PIPELINED].append(await real.first_token())
    links = [Link("here", median(hops), float("inf"))] * stages
    costs = _costs(watched, median(alone) - stages * median(hops))

    def cluster(users: int) -> Cluster:
        return Cluster(costs, links, 1024, users=users, cores=os.cpu_count())

    foretold = {
        f"{users} users, tokens/s": simulation.speed(cluster(users), users, 4 * TOKENS)
        for users in (1, 2, 4)
    }
    one, many = cluster(1), cluster(1)
    one.model.prefill_window = PrefillWindow(1, lambda: one.world.now)
    for each in (one, many):
        simulation.first_token(each, PROMPT)
    foretold[ONE_CHUNK] = simulation.first_token(one, PROMPT)
    foretold[PIPELINED] = simulation.first_token(many, PROMPT)
    return [
        {"stages": stages, "what": what, "measured": median(values), "simulated": foretold[what]}
        for what, values in found.items()
    ]


def _costs(watched: Watched, step: float) -> list[StageCost]:
    """Costs of each stage. The part of a `step` that no stage accounts for is the head's."""
    costs, rest = [], step
    for _, by_shape in sorted(watched.seconds.items()):
        one, two = median(by_shape[1, 1]), median(by_shape[2, 1])
        chunks = [
            (shape[1], seconds)
            for shape, all_seconds in by_shape.items()
            for seconds in all_seconds
            if shape[1] > PUSHED_TOKENS
        ]
        slope, fixed = np.polyfit(*zip(*chunks, strict=True), 1)
        rest -= one
        more = max(two - one, 0.0)
        costs.append(StageCost(partial(_line, one - more, more), partial(_line, fixed, slope)))
    tail = max(rest, 0.0)
    costs[0] = StageCost(costs[0].decode, costs[0].prefill, lambda answers: tail)
    return costs


def _line(at_none: float, each: float, count: int) -> float:
    """Seconds, which a line through noisy points may put below 0."""
    return max(at_none + each * count, 1e-4)
