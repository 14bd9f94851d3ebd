"""A cluster in simulated time: the head's own scheduling, over machines and links that only cost.

The code that serves decides: Scheduler, Lane, ChunkSizer, mlx-lm's BatchGenerator, fibers and
windows. What is simulated is below them: the clock, and a model whose layers compute nothing but
take time, on machines that serve frames in the order they arrive, over links that carry one frame
after another.
"""

import heapq
import itertools
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import TextStateMachine
from mlx_lm.utils import load_tokenizer

from coordinator.planning.links import Link
from node.generation.config import GenerationConfig
from node.generation.request import Job
from node.generation.sampling import Sampling
from node.generation.scheduler import Scheduler
from node.generation.ticket import Ticket
from node.metering.meters import AnswerMeter
from node.pipeline.pending_logits import PendingLogits
from node.pipeline.pipeline_model import PUSHED_TOKENS
from node.ring.compute_thread import MLXThread, Signal
from node.ring.ring import PrefillWindow
from tests.support.tiny import write_tokenizer
from unicluster.deadlines import OTHER, Work
from unicluster.v1.chat_pb2 import GenerateEvent
from unicluster.v1.node_pb2 import StageSpec

VOCABULARY = 4


@dataclass(frozen=True)
class StageCost:
    """Seconds a stage takes. `decode`: of a step, by answers in it. `prefill`: of a chunk, by
    its tokens. `tail`: at the head, from a step's return to its tokens, by answers in it.
    """

    decode: Callable[[int], float]
    prefill: Callable[[int], float]
    tail: Callable[[int], float] = lambda answers: 0.0


class World:
    """Time, what happens when, and the thread that the head computes on."""

    def __init__(self, cores: int | None = None) -> None:
        """cores: how many machines can compute at a time, where they share one; None: all."""
        self.now = 0.0
        self.thread = Thread()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._cores = cores
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Runs `action` then. It may wake fibers, but not wait."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), action))

    def work(self, seconds: float, done: Callable[[], None]) -> None:
        """Computes for so long, once a core is free."""
        self._waiting.append((seconds, done))
        self._assign()

    def compute(self, seconds: float) -> None:
        """Computes for so long on the head's thread, where nothing else runs meanwhile."""
        ended: list[bool] = []
        self.work(seconds, lambda: ended.append(True))
        while not ended:
            self._step()

    def run(self, until: Callable[[], bool]) -> None:
        """Lets things happen until that is so. RuntimeError if nothing happens any more."""
        while not until():
            if not self.thread.run_one():
                self._step()

    def _step(self) -> None:
        if not self._events:
            raise RuntimeError("the simulated cluster waits for nothing")
        self.now, _, action = heapq.heappop(self._events)
        action()

    def _assign(self) -> None:
        while self._waiting and (self._cores is None or self._cores > 0):
            seconds, done = self._waiting.popleft()
            if self._cores is not None:
                self._cores -= 1
            self.after(seconds, partial(self._release, done))

    def _release(self, done: Callable[[], None]) -> None:
        if self._cores is not None:
            self._cores += 1
        done()
        self._assign()


class Thread(MLXThread):
    """The head's thread and its fibers, without a thread."""

    def __init__(self) -> None:
        self._due: deque[Callable[[], object]] = deque()

    def post(self, action: Callable[[], object], work: Work = OTHER) -> None:
        self._due.append(action)

    def run_one(self) -> bool:
        """Runs what is due first; False if nothing is."""
        if not self._due:
            return False
        self._due.popleft()()
        return True


@dataclass
class _Frame:
    answers: int
    tokens: int
    size: int
    back: Callable[[], None]


class _Stop:
    """A machine, and the link by which frames leave it."""

    def __init__(self, world: World, cost: StageCost, link: Link) -> None:
        self.next: Callable[[_Frame], None] = lambda frame: frame.back()
        self._world = world
        self._cost = cost
        self._link = link
        self._queue: deque[_Frame] = deque()
        self._busy = False
        self._link_free = 0.0

    def arrive(self, frame: _Frame) -> None:
        self._queue.append(frame)
        self._serve()

    def send(self, frame: _Frame) -> None:
        """Onto the link, after what was sent before."""
        start = max(self._world.now, self._link_free)
        self._link_free = start + frame.size / self._link.bytes_per_s
        there = self._link_free + self._link.latency_s - self._world.now
        self._world.after(there, lambda: self.next(frame))

    def _serve(self) -> None:
        if self._busy or not self._queue:
            return
        self._busy = True
        frame = self._queue.popleft()

        def done() -> None:
            self._busy = False
            self.send(frame)
            self._serve()

        self._world.work(seconds(self._cost, frame.answers, frame.tokens), done)


def seconds(cost: StageCost, answers: int, tokens: int) -> float:
    """Seconds of one frame of `answers`, each with `tokens`."""
    return cost.prefill(answers * tokens) if tokens > PUSHED_TOKENS else cost.decode(answers)


class Cache:
    """All of an answer's caches, which hold nothing."""

    state: Sequence[Any] = ()
    nbytes = 0

    def merge(self, caches: Sequence["Cache"]) -> "Cache":
        return Cache()

    def extract(self, index: int) -> "Cache":
        return Cache()

    def filter(self, rows: Any) -> None: ...
    def extend(self, other: "Cache") -> None: ...
    def prepare(self, **lengths: Any) -> None: ...
    def finalize(self) -> None: ...


@dataclass
class _FrameProgress:
    slowest_s: float | None = None


class Pipeline:
    """A model for the scheduler that behaves like PipelineModel, in simulated time."""

    def __init__(
        self, world: World, costs: Sequence[StageCost], links: Sequence[Link], hidden_bytes: int
    ) -> None:
        """links: from each stage to the next, and from the last back to the head."""
        self.stages = len(costs)
        self.layers = [object()]
        self.prefill_window = PrefillWindow(self.stages, lambda: world.now)
        self._world = world
        self._head, *self._others = costs
        self._hidden = hidden_bytes
        self._stops = [_Stop(world, *pair) for pair in zip(costs, links, strict=True)]
        for stop, after in itertools.pairwise(self._stops):
            stop.next = after.arrive

    def make_cache(self) -> list[Cache]:
        return [Cache()]

    def __call__(self, inputs: mx.array, cache: Any = None) -> Any:
        answers, tokens = inputs.shape
        hold = tokens > PUSHED_TOKENS
        if hold:
            self.prefill_window.enter()
        self._world.compute(seconds(self._head, answers, tokens))
        if hold:
            self.prefill_window.depart()
        there = Signal()
        progress = _FrameProgress()

        def back() -> None:
            progress.slowest_s = self._slowest(answers, tokens)
            if hold:
                self.prefill_window.leave()
            there.set()

        size = answers * tokens * self._hidden
        if self.stages > 1:
            self._stops[0].send(_Frame(answers, tokens, size, back))
        else:
            back()

        def resolve() -> mx.array:
            there.wait()
            self._world.compute(self._head.tail(answers))
            return mx.zeros((answers, tokens, VOCABULARY))

        return PendingLogits(resolve, progress=progress)

    def _slowest(self, answers: int, tokens: int) -> float:
        return max((seconds(cost, answers, tokens) for cost in self._others), default=0.0)


class Asked(Ticket):
    """A request, and when its tokens came in simulated time."""

    def __init__(self, world: World, job: Job) -> None:
        self.job = job
        self.asked = world.now
        self.ended = False
        self.broken = ""
        self.at: list[float] = []
        self._world = world

    def send(self, events: list[GenerateEvent]) -> None:
        for event in events:
            self.at.extend([self._world.now] * len(event.delta.token_ids))

    def end(self, error: Exception | None = None) -> None:
        self.ended = True
        if error is not None:
            raise error


@dataclass
class Cluster:
    """A head that serves `users` over simulated stages."""

    costs: Sequence[StageCost]
    links: Sequence[Link]
    hidden_bytes: int
    users: int
    lanes: int | None = None
    cores: int | None = None
    prefill_step: int = 512
    world: World = field(init=False)
    scheduler: Scheduler = field(init=False)
    model: Pipeline = field(init=False)

    def __post_init__(self) -> None:
        self.world = World(self.cores)
        self.model = Pipeline(self.world, self.costs, self.links, self.hidden_bytes)
        self.scheduler = Scheduler(
            self.world.thread,
            self.model,
            _tokenizer(),
            GenerationConfig(
                StageSpec(context=2**20, users=self.users, lanes=self.lanes or 0),
                model_name="simulated",
                prefill_step=self.prefill_step,
            ),
            meter=AnswerMeter(),
            on_end=lambda ticket: None,
            on_error=_raise,
            clock=lambda: self.world.now,
        )

    def ask(self, prompt: int, tokens: int) -> Asked:
        """A request, now, with so many tokens of prompt and so many of answer."""
        ids = [1] * prompt
        marks = TextStateMachine().make_state("normal")
        asked = Asked(self.world, Job(ids, tokens, Sampling(), (), None, marks, ignore_eos=True))
        self.world.thread.post(lambda: self.scheduler.add(asked))
        return asked

    def hear(self, *asked: Asked) -> None:
        """Until all of them have ended."""
        self.world.run(lambda: all(each.ended for each in asked))


def speed(cluster: Cluster, users: int, tokens: int, prompt: int = 32) -> float:
    """Tokens a second of so many users together, while all decode."""
    asked = [cluster.ask(prompt, tokens) for _ in range(users)]
    cluster.hear(*asked)
    begin, end = max(each.at[0] for each in asked), min(each.at[-1] for each in asked)
    return sum(begin < at <= end for each in asked for at in each.at) / (end - begin)


def first_token(cluster: Cluster, prompt: int) -> float:
    """Seconds to the first token of a user alone."""
    asked = cluster.ask(prompt, 1)
    cluster.hear(asked)
    return asked.at[0] - asked.asked


@cache
def _tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return load_tokenizer(Path(folder))


def _raise(error: Exception) -> None:
    raise error
