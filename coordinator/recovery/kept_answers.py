"""Answers whose clients said that they would come back: they go on when a connection is lost."""

import asyncio
import contextlib
import logging
import math
import secrets
from collections import deque
from collections.abc import AsyncGenerator

from unicluster.errors import BusyError, InputError, NotFoundError, UniclusterError
from unicluster.v1.chat_pb2 import GenerateEvent

log = logging.getLogger(__name__)

# Seconds that a client may ask for.
MOST_SECONDS = 600.0
# Answers kept at once, and of them for one client.
MOST_KEPT = 256
MOST_OF_ONE = 64
# Of the events of one answer, in bytes of the wire. An answer with more to keep waits.
MOST_BYTES = 1 << 20
GONE = "answer_id: no such answer is kept here for you"


class KeptAnswer:
    """One answer, which is computed whether its client is connected or not.

    Its events are kept until its client is far beyond them. `id` is 128 random bits.
    """

    def __init__(self, events: AsyncGenerator[GenerateEvent, None], seconds: float) -> None:
        """seconds: how long a client that has left may stay away."""
        self.id = secrets.token_urlsafe(16)
        self.seconds = seconds
        self.gone = asyncio.Event()  # nobody can come back for it any more
        self._events = events
        self._log: deque[GenerateEvent] = deque()
        self._first = 0  # the number of the first one in it, statuses included
        self._counted = 0  # events before it, without statuses
        self._bytes = 0
        self._error: UniclusterError | None = None
        self._ended = False
        self._readers = 0  # so far: the newest one reads
        self._read_to: int | None = None  # the next event of the one that is connected
        self._timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._collect())

    @property
    def idle(self) -> bool:
        """Whether it is complete, and nobody is reading it."""
        return self._ended and self._read_to is None

    async def read(self, have: int) -> AsyncGenerator[GenerateEvent, None]:
        """The events behind the first `have` of them, statuses not counted, as they come.

        Another reader before this one ends with BusyError. Raises what ended the answer, and
        NotFoundError for what is not kept any more. When a reader leaves, the time runs.
        """
        if self.gone.is_set():
            raise NotFoundError(GONE)
        number = self._number_of(have)
        self._readers += 1
        me = self._readers
        self._stop_timer()
        self._read_to = number
        self._wake()
        try:
            while me == self._readers:
                if number < self._first + len(self._log):
                    yield self._log[number - self._first]
                    number += 1
                    if me == self._readers:
                        self._read_to = number
                        self._wake()
                elif self._error is not None:
                    self.end()
                    raise self._error
                elif self._ended:
                    return
                else:
                    await self._news.wait()  # its call's end, or the answer's, ends this
            raise BusyError("the answer goes on in a newer connection of its client")
        finally:
            if me == self._readers:
                self._read_to = None
                self._start_timer()

    def leave(self) -> None:
        """The time runs for a client that has gone, perhaps before it read anything."""
        if self._read_to is None and self._timer is None:
            self._start_timer()

    def end(self) -> None:
        """Ends the answer, if it is still computed, and forgets its events."""
        self.gone.set()
        self._stop_timer()
        self._task.cancel()
        self._log.clear()

    async def ended(self) -> None:
        """Ends it, and returns when nothing runs for it any more."""
        self.end()
        await asyncio.gather(self._task, return_exceptions=True)

    def _number_of(self, have: int) -> int:
        """Number of the event behind the first `have` counted ones."""
        counted = self._counted
        if have < counted:
            raise NotFoundError(f"events: those behind the first {have} are not kept any more")
        for number, event in enumerate(self._log, start=self._first):
            if counted == have:
                return number
            counted += not event.HasField("status")
        if counted != have:
            raise NotFoundError(f"events: there are no {have} of this answer yet")
        return self._first + len(self._log)

    async def _collect(self) -> None:
        try:
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    while self._bytes > MOST_BYTES and not self._drop_oldest():
                        await self._news.wait()  # the timer ends it where no client comes
                    self._log.append(event)
                    self._bytes += event.ByteSize()
                    self._wake()
        except UniclusterError as error:
            self._error = error
        except Exception:
            log.exception("a kept answer failed")
            self._error = UniclusterError("unexpected error here: the log of `serve` has it")
        finally:
            self._ended = True
            self._wake()

    def _drop_oldest(self) -> bool:
        """Forgets the oldest event, if a client that is connected was sent it."""
        if self._read_to is None or self._read_to <= self._first:
            return False
        oldest = self._log.popleft()
        self._first += 1
        self._counted += not oldest.HasField("status")
        self._bytes -= oldest.ByteSize()
        return True

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _start_timer(self) -> None:
        self._stop_timer()
        if not self.gone.is_set():
            self._timer = asyncio.get_running_loop().call_later(self.seconds, self.end)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class KeptAnswers:
    """Kept answers of all clients, by client and id. An owner is a client that proved who it is."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str], KeptAnswer] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def has_room(self, owner: str) -> bool:
        """Whether one more can be kept for `owner`; complete ones that nobody reads give way."""
        self._forget_gone()
        mine = sum(each == owner for each, _ in self._answers)
        if mine >= MOST_OF_ONE:
            return self._evict(owner)
        return len(self._answers) < MOST_KEPT or self._evict(None)

    def keep(
        self, owner: str, events: AsyncGenerator[GenerateEvent, None], seconds: float
    ) -> KeptAnswer:
        """An answer from now on. Raises BusyError where there is no room for it."""
        if not self.has_room(owner):
            raise BusyError("too many answers are kept here for clients: try again later")
        answer = KeptAnswer(events, seconds)
        self._answers[owner, answer.id] = answer
        return answer

    def find(self, owner: str, answer_id: str) -> KeptAnswer:
        """Raises NotFoundError where none of that id is kept for `owner`."""
        self._forget_gone()
        answer = self._answers.get((owner, answer_id))
        if answer is None:
            raise NotFoundError(GONE)
        return answer

    def abandon(self, owner: str, answer_id: str) -> None:
        """Ends one, if there is one of that id for `owner`."""
        answer = self._answers.pop((owner, answer_id), None)
        if answer is not None:
            answer.end()

    async def close(self) -> None:
        """Ends all of them."""
        answers, self._answers = self._answers, {}
        await asyncio.gather(*(answer.ended() for answer in answers.values()))

    def _forget_gone(self) -> None:
        self._answers = {k: each for k, each in self._answers.items() if not each.gone.is_set()}

    def _evict(self, owner: str | None) -> bool:
        """Ends the oldest complete answer, of `owner` if given, that nobody reads."""
        for key, answer in self._answers.items():
            if answer.idle and owner in (None, key[0]):
                self.abandon(*key)
                return True
        return False


def check_seconds(seconds: float) -> None:
    """Raises InputError for no time that an answer may be kept."""
    if not (0 <= seconds <= MOST_SECONDS and math.isfinite(seconds)):
        raise InputError(f"resume_s: between 0 and {MOST_SECONDS:g} seconds, got {seconds:g}")
