"""How a client gets the whole of an answer over connections, and from servers, that are lost.

Pure but for a clock: the clients ask, wait and report as an Asking says.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc

from unicluster.client.answers import (
    ChatInfo,
    Event,
    Finish,
    Status,
    event_from_wire,
)
from unicluster.client.transcript import Transcript
from unicluster.cluster.channels import as_error, is_our_own
from unicluster.errors import (
    BusyError,
    InputError,
    NotFoundError,
    StoppingError,
    UnavailableError,
    UniclusterError,
)
from unicluster.v1 import chat_pb2 as wire

# For which a client comes back that has not said for how long.
RETURN_SECONDS = 30.0
# Between two attempts: doubles from the first to the last.
FIRST_PAUSE = 0.1
LAST_PAUSE = 1.0
# Between two looks at a server that loads.
LOOK_SECONDS = 0.5
# Calls that were answered and broke off with no more of the answer than before.
MOST_TRIES = 5


@dataclass(frozen=True)
class Patience:
    """For how many seconds a client comes back, and for how many it waits for a server that loads.

    resume: the server is asked to keep an answer for so long when its client's connection is lost,
    and the client comes back for as long; 0: it does not; None: it does for RETURN_SECONDS, and
    nothing is kept: what is missing is computed again.
    """

    resume: float | None = None
    wait: float = 0.0

    def __post_init__(self) -> None:
        for name, seconds in (("resume", self.resume or 0.0), ("wait", self.wait)):
            if not (seconds >= 0 and math.isfinite(seconds)):
                raise InputError(f"{name} can't be {seconds!r}: give seconds, 0 or more")


class Asking:
    """One answer: which call comes next, its events, and what a lost connection means.

    finished: the Finish is here. waits: for a server that loads, before anything was asked.
    """

    def __init__(
        self,
        request: wire.GenerateRequest,
        patience: Patience,
        deadline: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`request` is changed. deadline: seconds from now for all of the answer."""
        self._patience = patience
        self._clock = clock
        self._asked = clock()
        self._ends = None if deadline is None else self._asked + deadline
        if patience.resume != 0:
            request.resume_s = patience.resume or 0.0
        self._transcript = Transcript(request, "the server")
        self.finished = False
        self.waits = False
        self.kept = ""  # id of the answer, where a server keeps it
        self._continues = False  # whether the call that runs is for the rest of that
        self._events = 0  # of the server's answer, that are here
        self._begun = False  # whether a server has begun to answer, or keeps the answer
        self._came = False  # whether the call that runs has brought anything
        self._moved = False  # whether another server went on
        self._gap = _Gap()
        self._first = self._last = 0.0  # when events of tokens came
        self._shown: Status | None = None

    def ask(self) -> wire.GenerateRequest | wire.ContinueRequest:
        """The next call: for the answer, or for the rest of it."""
        self._came = False
        self._continues = bool(self.kept)
        if self._continues:
            self._transcript.drop_held()
            return wire.ContinueRequest(answer_id=self.kept, events=self._events)
        self._events = 0
        self._moved = self._begun
        return self._transcript.request()

    @property
    def timeout(self) -> float | None:
        """Seconds that the next call may take; None: as long as it takes."""
        return None if self._ends is None else max(self._ends - self._clock(), 0.0)

    def take(self, message: wire.GenerateEvent) -> list[Event | Status]:
        """The events that are new by a message. Raises StageError for what no server says."""
        kind = message.WhichOneof("event")
        if kind == "kept":
            self.kept, self._begun = message.kept.answer_id, True
            return []
        self._begun = self._came = True
        if kind == "status":
            said = message.status
            return [Status(said.state, said.detail, said.cause)]
        if kind is None:
            event_from_wire(message)  # raises what it means
        ready = self._transcript.take(message)
        self._events += len(ready) + (kind == "begun")
        if not ready:
            return []
        self._last = self._clock()
        self._first = self._first or self._last
        self.finished = self._transcript.finished
        events = [self._timed(event_from_wire(each)) for each in ready]
        gap, self._gap = self._gap, _Gap()
        return [Status("resumed", ""), *events] if gap.reason is not None else [*events]

    def broke_off(self, error: Exception | None, server: str) -> tuple[float, Status | None]:
        """Seconds until the next call, and what to say of it, if anything.

        error: what a call, or looking for the server, has raised; None: the call just ended.
        Raises the error, as one of ours, where the client can't come back or not any more.
        """
        reason, kind = _meaning(error, server, came=self._came, continues=self._continues)
        now = self._clock()
        if kind == "final" or (self._ends is not None and now >= self._ends):
            raise reason from error
        if kind in ("unknown", "refused", "busy"):
            self.kept = ""
        if not self._begun and not self.kept:
            return self._wait(reason, error, kind == "refused" or self._shown is not None), None
        gap = self._gap
        if self._patience.resume == 0 or not (self._transcript.can_resume or self.kept):
            raise (gap.reason or reason) from error
        news = None
        if gap.reason is None:
            gap.reason, gap.since = reason, now
            news = Status("lost", str(reason))
        gap.tries += self._came
        limit = RETURN_SECONDS if self._patience.resume is None else self._patience.resume
        if kind == "refused":
            limit = max(limit, self._patience.wait)
        if now - gap.since >= limit or gap.tries > MOST_TRIES:
            raise _given_up(reason, now - gap.since) from error
        return (0.0 if kind == "unknown" else gap.pause()), news

    def looked(self, state: ChatInfo | UniclusterError) -> tuple[float, Status | None]:
        """Seconds until the next look at a server that loads, and what to say, if it is new.

        Raises the server's reason once waiting has no point, or has taken too long.
        """
        why = str(state)
        if isinstance(state, ChatInfo):
            said = Status(state.state, state.detail, state.cause)
            why = f"{state.model} is {state.state}" + (f": {state.detail}" if state.detail else "")
        elif isinstance(state, UnavailableError):
            said = Status("loading", why)
        else:
            raise state
        now = self._clock()
        late = now - self._asked >= self._patience.wait or self.timeout == 0
        self.waits = said.state in ("loading", "recovering")
        if said.state == "failed" or (self.waits and late):
            waited = f"; waited {now - self._asked:.0f} s for it" if late else ""
            raise UnavailableError(f"{why}{waited}")
        news = said if said != self._shown else None
        self._shown = said
        return (LOOK_SECONDS if self.waits else 0.0), news

    def _wait(self, reason: UniclusterError, error: Exception | None, may_wait: bool) -> float:
        """Begins to wait for a server that loads. Raises `reason` where that is not to be."""
        late = self._clock() - self._asked >= self._patience.wait
        if late or not may_wait:
            raise reason from error
        self.waits = True
        return 0.0 if self._shown is None else LOOK_SECONDS

    def _timed(self, event: Event) -> Event:
        """Times as this client saw them, where several servers had a part in the answer."""
        if not isinstance(event, Finish) or not self._moved:
            return event
        seconds, tokens = self._last - self._first, event.usage.completion_tokens
        timings = replace(
            event.timings,
            time_to_first_token_s=self._first - self._asked,
            decode_s=seconds,
            tokens_per_s=(tokens - 1) / seconds if seconds > 0 and tokens else 0.0,
        )
        return replace(event, timings=timings)


@dataclass
class _Gap:
    """Since an answer broke off. tries: calls that were answered since, with nothing new."""

    reason: UniclusterError | None = None
    since: float = 0.0
    tries: int = 0
    pauses: int = 0

    def pause(self) -> float:
        """Seconds until the next attempt: none before the first, then longer and longer."""
        self.pauses += 1
        return 0.0 if self.pauses == 1 else min(FIRST_PAUSE * 2 ** (self.pauses - 2), LAST_PAUSE)


def _meaning(
    error: Exception | None, server: str, *, came: bool, continues: bool
) -> tuple[UniclusterError, str]:
    """An error as one of ours, and its kind.

    lost: another attempt may come through. refused: the server can't answer now. busy: its queue is
    full. unknown: it does not keep the answer that was to go on. final: all else.
    """
    if error is None:
        return UnavailableError(f"the answer of {server} broke off without a reason: ask again"), (
            "lost"
        )
    if isinstance(error, UniclusterError):  # of the search for a server
        return error, "lost" if isinstance(error, UnavailableError) else "final"
    if not isinstance(error, grpc.RpcError):
        raise error
    reason, code, ours = as_error(error, server), error.code(), is_our_own(error)
    if isinstance(reason, StoppingError):
        return reason, "lost"
    if continues and (isinstance(reason, NotFoundError) or code is grpc.StatusCode.UNIMPLEMENTED):
        return reason, "unknown"
    if ours and not came and not continues and isinstance(reason, UnavailableError | BusyError):
        return reason, "refused" if isinstance(reason, UnavailableError) else "busy"
    gone = code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
    )
    lost = gone and not ours and isinstance(reason, UnavailableError)
    return reason, "lost" if lost else "final"


def _given_up(reason: UniclusterError, seconds: float) -> UniclusterError:
    return UnavailableError(f"{reason}; the answer was not to be had for {seconds:.0f} s")
