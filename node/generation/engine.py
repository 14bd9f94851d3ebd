"""The generation engine: runs at the head, over any mlx-lm model object.

A request's way: `submit` checks and tokenizes it beside the event loop and hands it to the
scheduler on the MLX thread, where it gets a place in a lane; each step's tokens become events in
its ticket; when it finishes, fails or is cancelled it leaves, and its caches are free.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from node.constraints.vocabulary import Vocabulary
from node.generation.config import GenerationConfig
from node.generation.request import Job, check_request
from node.generation.sampling import Sampling
from node.generation.scheduler import Scheduler
from node.generation.ticket import Ticket
from node.metering.meters import AnswerMeter
from node.mlx.memory import give_all_back
from node.prompts.cancellation import Cancellation
from node.prompts.templates import MOST_AT_ONCE, TEMPLATES, shows_tools
from node.prompts.tokenizing import LONG, Tokenizing
from node.prompts.turns import Turns
from node.ring.compute_thread import MLXThread
from node.speculation.meter import speculation_meter
from unicluster.deadlines import floor_seconds
from unicluster.errors import (
    BusyError,
    NotFoundError,
    StageError,
    UnavailableError,
    UniclusterError,
)
from unicluster.v1.chat_pb2 import ChatInfo, GenerateRequest
from unicluster.v1.meters_pb2 import Meters

log = logging.getLogger("unicluster.engine")

# Threads that render and tokenize prompts: most of them wait for a template's child.
CHECKERS = MOST_AT_ONCE
LONG_AT_ONCE = 1
# For answers that were ended to leave their lanes.
SETTLE_FLOORS = 1.0


class GenerationEngine:
    """Answers up to `users` requests at once, and queues some more.

    With `kv_bytes` in its configuration, caches of finished answers are reused for prompts with a
    common prefix. The model is set by `set_model`, and must have been made on `thread`.
    """

    def __init__(self, thread: MLXThread, tokenizer: Any, config: GenerationConfig) -> None:
        self._thread = thread
        self._tokenizer = tokenizer
        self._config = config
        self._name = config.model_name
        self._defaults = Sampling.of_model(config.defaults)
        self._vocabulary = Vocabulary(tokenizer)
        dialect = self._vocabulary.dialect
        self._tools = dialect.calls is not None and shows_tools(tokenizer)
        self._reasons = dialect.reasons
        self._tokenizing = Tokenizing(tokenizer, config.spec.context)
        self._checkers = ThreadPoolExecutor(max_workers=CHECKERS, thread_name_prefix="tokenize")
        self._long = Turns(LONG_AT_ONCE)  # long prompts leave threads and cores to short ones
        self._checking = 0  # requests whose prompt waits for a thread, or is being tokenized
        TEMPLATES.warm()

        self._lock = threading.Lock()  # for what is touched from both sides:
        self._open: set[Ticket] = set()
        self._state = "loading"
        self._failure: UniclusterError | None = UnavailableError(f"{self._name} is still loading")

        self.meter = AnswerMeter()
        # Called on the MLX thread once the model has failed: it is of no more use.
        self.on_failure: Callable[[UniclusterError], None] = lambda error: None
        # Only for the MLX thread, but for its counters:
        self.scheduler: Scheduler | None = None

    async def submit(self, request: GenerateRequest) -> Ticket:
        """Queues a request.

        Raises InputError that begins with the field's name, NotFoundError for another model,
        BusyError when the queue is full, and UnavailableError while no model works.
        """
        asked = time.perf_counter()
        if request.model not in ("", self._name):
            raise NotFoundError(f"model: {request.model!r} is not served here, {self._name!r} is")
        self._check_room()
        self._checking += 1
        try:
            job = await self._check(request)
        finally:
            self._checking -= 1
        ticket = Ticket(job, asked, on_cancel=self._on_cancel)
        with self._lock:
            self._check_room()
            self._open.add(ticket)
            self._thread.post(partial(self._admit, ticket))
        return ticket

    async def count_tokens(self, request: GenerateRequest) -> int:
        """Tokens of a request's prompt. Raises as `submit`."""
        self._check_room()
        self._checking += 1
        try:
            return len((await self._check(request)).tokens)
        finally:
            self._checking -= 1

    async def _check(self, request: GenerateRequest) -> Job:
        """Whoever waits for this may leave: then the work ends, too."""
        cancellation = Cancellation()
        context = self._config.spec.context
        work = partial(
            check_request,
            *(request, self._tokenizer, context, self._defaults),
            *(self._tokenizing, self._vocabulary, cancellation),
        )
        size = request.ByteSize()
        slot = self._long.turn(size) if size > LONG else contextlib.nullcontext()
        try:
            async with slot:
                return await asyncio.get_running_loop().run_in_executor(self._checkers, work)
        finally:
            cancellation.cancel()

    async def set_model(self, model: Any) -> None:
        """Serves `model` from now on: after loading, and after a failure.

        What runs or waits until then ends with UnavailableError.
        """
        await self._thread.run(partial(self._install, model))

    async def save_prefixes(self, seconds: float) -> int:
        """Has all stages save their cached prefixes; how many there are.

        Returns when that is done, or after `seconds`.
        """
        scheduler = self.scheduler
        if scheduler is None:
            return 0
        return await self._thread.run(partial(scheduler.save_all, seconds))

    async def settle(self) -> None:
        """Ends every request, and waits until the caches of their answers can be reused.

        Not for ever: where a step does not come back, they are not.
        """
        with self._lock:
            tickets = list(self._open)
        for ticket in tickets:
            ticket.cancel()
        scheduler = self.scheduler
        if scheduler is None:
            return
        seconds = SETTLE_FLOORS * floor_seconds()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * seconds):  # the thread itself may be at a long step
                await self._thread.run(partial(scheduler.settle, seconds))

    def fail(self, error: UniclusterError) -> None:
        """Ends every request with `error` and refuses others until `set_model`; any thread."""
        with self._lock:
            self._state, self._failure = "failed", error
            self._thread.post(self._discard_failed)
        self._end_all(error)

    def close(self) -> None:
        """Ends every request with UnavailableError and releases the model; any thread."""
        self.fail(UnavailableError(f"{self._name} is shutting down"))
        self._checkers.shutdown(wait=False, cancel_futures=True)

    def describe(self) -> ChatInfo:
        """Describes model, state and lanes, without weights and without other machines."""
        scheduler = self.scheduler
        with self._lock:
            detail = "" if self._failure is None else str(self._failure)
            return ChatInfo(
                model=self._name,
                context=self._config.spec.context,
                users=self._config.spec.users,
                state=self._state,
                detail=detail,
                lanes=len(scheduler.lanes) if scheduler is not None else 0,
                kept_caches=len(scheduler.prefix_cache) if scheduler is not None else 0,
                kept_bytes=scheduler.prefix_cache.nbytes if scheduler is not None else 0,
                tools=self._tools,
                reasons=self._reasons,
            )

    @property
    def disk_bytes(self) -> int:
        """Bytes of prefixes on this machine's disk."""
        return self._config.prefixes.store.nbytes if self._config.prefixes is not None else 0

    def measure(self) -> Meters:
        """Counters of the engine, and the requests that run and wait now."""
        meters, scheduler = self.meter.to_wire(), self.scheduler
        meters.now_s = time.perf_counter()
        if scheduler is not None:
            meters.running = sum(len(lane.sequences) for lane in list(scheduler.lanes))
            meters.waiting = len(scheduler.waiting)
            meters.kept_bytes = scheduler.prefix_cache.nbytes
            meters.promised_bytes = scheduler.reserved
            meters.cache_bytes = scheduler.kv_budget.total
            if (speculation := self._config.speculation) is not None:
                meters.speculation.CopyFrom(speculation_meter(speculation, scheduler.paces))
        if self._config.prefixes is not None:
            meters.disk_limit_bytes = self._config.prefixes.store.most
        return meters

    def _check_room(self) -> None:
        if self._failure is not None:
            raise UnavailableError(str(self._failure))
        users, most_waiting = self._config.spec.users, self._config.most_waiting
        if len(self._open) + self._checking >= users + most_waiting:
            raise BusyError(
                f"the queue is full: {users} requests run and {most_waiting} wait; try again later"
            )

    def _end_all(self, error: UniclusterError) -> None:
        with self._lock:
            tickets, self._open = self._open, set()
            self.meter.ended["failed"] += len(tickets)
        for ticket in tickets:
            ticket.end(type(error)(*error.args))  # one each: raising writes into an exception

    def _on_cancel(self, ticket: Ticket) -> None:
        self._thread.post(partial(self._forget, ticket))

    # From here on, on the MLX thread.

    def _install(self, model: Any) -> None:
        self._end_all(UnavailableError(f"{self._name} is being loaded again; ask again"))
        self._discard()
        self.scheduler = Scheduler(
            self._thread,
            model,
            self._tokenizer,
            self._config,
            meter=self.meter,
            on_end=self._on_end,
            on_error=self._on_error,
        )
        with self._lock:
            self._state, self._failure = "ready", None

    def _discard_failed(self) -> None:
        if self._failure is not None:  # else a new model came first
            self._discard()

    def _discard(self) -> None:
        if self.scheduler is not None:
            self.scheduler.close()
        self.scheduler = None
        give_all_back()

    def _admit(self, ticket: Ticket) -> None:
        if self.scheduler is not None and not ticket.ended:
            self.scheduler.add(ticket)

    def _forget(self, ticket: Ticket) -> None:
        self._on_end(ticket)
        if self.scheduler is not None:
            self.scheduler.drop(ticket)

    def _on_end(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket in self._open and ticket.broken:
                self.meter.ended[ticket.broken] += 1
            self._open.discard(ticket)

    def _on_error(self, error: Exception) -> None:
        """An error of the model leaves a batch in pieces: all requests end with it."""
        if isinstance(error, UniclusterError):
            # Its traceback references the batch and with it the caches.
            failure = error.with_traceback(None)
        else:
            log.error("the model failed", exc_info=error)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            failure = StageError(f"{self._name} failed while computing: {reason}")
        self.fail(failure)
        self.on_failure(failure)
