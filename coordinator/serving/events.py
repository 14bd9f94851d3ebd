"""Events of a model that is being served, and how they reach those who follow them.

Publishing never blocks: every follower has a bounded queue and a thread, so that one that
blocks or fails affects no other.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from coordinator.planning.machine import Machine
from coordinator.planning.placement import Plan, Stage
from coordinator.planning.variants import ModelVariants
from unicluster.causes import Cause
from unicluster.errors import UniclusterError
from unicluster.v1.node_pb2 import LoadProgress

log = logging.getLogger(__name__)

# Events that may wait for a follower; a large model's loading is some hundreds.
WAITING = 10_000
# For a follower to catch up with what was published, when that is waited for.
CATCH_UP_SECONDS = 2.0


@dataclass(frozen=True)
class Searching:
    """Machines are being looked for."""


@dataclass(frozen=True)
class MachinesFound:
    """The machines that answered, whether or not they will be used."""

    machines: tuple[Machine, ...]


@dataclass(frozen=True)
class Inspecting:
    """A machine is computing what the model weighs, and may fetch its configuration first."""

    model: str


@dataclass(frozen=True)
class Inspected:
    """The sizes of the model are known, in every variant that may be loaded."""

    model: str
    variants: ModelVariants


@dataclass(frozen=True)
class Planned:
    """A placement was chosen; its stages begin to load."""

    model: str
    variants: ModelVariants
    plan: Plan


@dataclass(frozen=True)
class Progress:
    """A stage has fetched or loaded more of its weights."""

    machine: str
    progress: LoadProgress


@dataclass(frozen=True)
class StageAdopted:
    """A machine holds a stage already, of a deployment before: nothing is loaded again."""

    machine: str


@dataclass(frozen=True)
class StageReady:
    """A stage has loaded all its layers."""

    machine: str


@dataclass(frozen=True)
class StageFailed:
    """A stage is lost; `reason` is a sentence that names the machine. cause: as in Cause."""

    machine: str
    reason: str
    cause: str = ""


@dataclass(frozen=True)
class WorkerEnded:
    """A worker has ended, and its machine starts another. cause: as in Cause."""

    machine: str
    reason: str
    cause: str


@dataclass(frozen=True)
class WasAsleep:
    """A machine is back, and says that it was asleep: for that it was lost, if it was."""

    machine: str
    seconds: float


@dataclass(frozen=True)
class Ready:
    """The model answers for the first time."""

    model: str


@dataclass(frozen=True)
class HttpAddress:
    """Where HTTP clients can ask. with_key: only with a key; is_private: only this machine."""

    url: str
    with_key: bool
    is_private: bool


@dataclass(frozen=True)
class Listening:
    """Clients can reach the model at `address`, and at `http`; Prometheus at the URL `metrics`.

    None: nowhere.
    """

    model: str
    address: str
    metrics: str | None
    http: HttpAddress | None = None


@dataclass(frozen=True)
class Recovering:
    """The model answered, and does not until `Recovered`; `reason` is a sentence."""

    model: str
    reason: str


@dataclass(frozen=True)
class Move:
    """Layers [first, end) that another machine holds now."""

    first: int
    end: int
    source: str
    target: str


@dataclass(frozen=True)
class Recovered:
    """The model answers again; `moved` is empty where every layer is where it was."""

    model: str
    moved: tuple[Move, ...]


@dataclass(frozen=True)
class Retrying:
    """The model has not answered yet, lost a machine, and is planned anew; `reason`: a sentence."""

    model: str
    reason: str


@dataclass(frozen=True)
class Moving:
    """The layers are about to move to a better plan, which saves `gain` of a token's time."""

    model: str
    gain: float
    moved: tuple[Move, ...]


@dataclass(frozen=True)
class Staying:
    """A better plan came to nothing, and the model answers where it did; `reason`: a sentence."""

    model: str
    reason: str


@dataclass(frozen=True)
class Leaving:
    """Serving ends, and soon begins anew; the machines keep their layers for `seconds`.

    reason: why, in a phrase.
    """

    model: str
    seconds: float
    reason: str


@dataclass(frozen=True)
class Unloading:
    """The model is given up, and the machines' memory with it."""

    model: str


Event = (
    Searching
    | MachinesFound
    | Inspecting
    | Inspected
    | Planned
    | Progress
    | StageAdopted
    | StageReady
    | StageFailed
    | WorkerEnded
    | WasAsleep
    | Ready
    | Listening
    | Recovering
    | Recovered
    | Retrying
    | Moving
    | Staying
    | Leaving
    | Unloading
)


def moves(before: Sequence[Stage], after: Sequence[Stage]) -> tuple[Move, ...]:
    """The layers whose machine changed, in as few ranges as possible, in order."""
    old, new = _holders(before), _holders(after)
    moved: list[Move] = []
    for layer, (source, target) in enumerate(zip(old, new, strict=True)):
        if source == target:
            continue
        last = moved[-1] if moved else None
        if last is not None and (last.end, last.source, last.target) == (layer, source, target):
            moved[-1] = Move(last.first, layer + 1, source, target)
        else:
            moved.append(Move(layer, layer + 1, source, target))
    return tuple(moved)


def _holders(stages: Sequence[Stage]) -> list[str]:
    return [stage.machine.name for stage in stages for _ in range(stage.first, stage.end)]


class Handler(Protocol):
    """Something that follows events. Both methods are called in one thread, never at once."""

    def handle(self, event: Event) -> None:
        """May block, and may raise."""

    def close(self) -> None:
        """Called once, when no more events come."""


class Events:
    """Publishes the events of a service. Publishing never waits and never raises.

    losses: of stages and workers so far, by cause; words that are none of Cause count as failed.
    """

    # Of the newest loss: its cause, and when it was published, by `time.monotonic`.
    _newest: tuple[Cause, float] | None = None

    def __init__(self) -> None:
        self.losses: Counter[Cause] = Counter()
        self._announced: set[str] = set()  # machines that said they would sleep, and are counted
        self._followers: list[Follower] = []

    def publish(self, event: Event) -> None:
        if isinstance(event, StageFailed | WorkerEnded):
            known = event.cause in list(Cause)
            cause = Cause(event.cause) if known else Cause.FAILED
            self.losses[cause] += 1
            self._newest = cause, time.monotonic()
            if cause is Cause.ASLEEP:
                self._announced.add(event.machine)
        if isinstance(event, WasAsleep):
            self.losses[Cause.ASLEEP] += event.machine not in self._announced
            self._announced.discard(event.machine)
        for follower in self._followers:
            follower.put(event)

    def cause_since(self, seconds: float) -> str:
        """The cause of the newest loss, if it was published within the last `seconds`, else ""."""
        if self._newest is None or time.monotonic() - self._newest[1] > seconds:
            return ""
        return self._newest[0].value

    @contextlib.contextmanager
    def followed(self, handler: Handler, name: str) -> "Iterator[Follower]":
        """While the block runs, `handler` gets each event; then it is closed.

        At the end of the block it has CATCH_UP_SECONDS to catch up. `name` is for the log.
        """
        follower = Follower(handler, name)
        self._followers.append(follower)
        try:
            yield follower
        finally:
            self._followers.remove(follower)
            follower.close()


class Follower:
    """A thread that hands events to a handler, in order, each once.

    Where the handler is so slow that WAITING events wait, further ones are dropped. The first
    drop and the first error are logged; of those that a handler explains, as for a full disk, the
    first after it has worked.
    """

    def __init__(self, handler: Handler, name: str) -> None:
        self._handler = handler
        self._name = name
        self._waiting: queue.Queue[Event | threading.Event | None] = queue.Queue(WAITING)
        self._dropped = self._failed = self._hindered = False
        # A daemon: a handler that is stuck must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            if not self._dropped:
                log.warning("%s is too slow: some events are dropped", self._name)
            self._dropped = True

    async def caught_up(self, timeout: float = CATCH_UP_SECONDS) -> bool:
        """Waits until everything published so far is handled; False where that took too long."""
        return await asyncio.to_thread(self._catch_up, timeout)

    def close(self, timeout: float = CATCH_UP_SECONDS) -> None:
        """Ends the thread once everything is handled, or leaves it behind after `timeout`."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=timeout)
            self._thread.join(timeout)

    def _catch_up(self, timeout: float) -> bool:
        reached = threading.Event()
        try:
            self._waiting.put_nowait(reached)
        except queue.Full:
            return False
        return reached.wait(timeout)

    def _run(self) -> None:
        while (event := self._waiting.get()) is not None:
            if isinstance(event, threading.Event):
                event.set()
            else:
                self._try(partial(self._handler.handle, event), type(event).__name__)
        self._try(self._handler.close, "its end")

    def _try(self, call: Callable[[], None], place: str) -> None:
        try:
            call()
        except UniclusterError as error:
            if not self._hindered:
                log.warning("%s: %s", self._name, error)
            self._hindered = True
        except Exception:
            if not self._failed:
                log.exception("%s failed at %s", self._name, place)
            self._failed = True
        else:
            self._hindered = False
