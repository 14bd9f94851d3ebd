"""The generation engine: runs at the head, over any mlx-lm model object.

A request's way: `submit` checks and tokenizes it beside the event loop and queues it; on the
MLX thread it gets a place in the lane; each step's tokens become events in its ticket; when it
finishes, fails or is cancelled it leaves the lane, and its caches are free.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import mlx.core as mx

from node.lane import Lane
from node.mlx_thread import MLXThread
from node.request import check_request
from node.sampling import Sampling
from node.ticket import Ticket
from unicluster.errors import (
    BusyError,
    NotFoundError,
    StageError,
    UnavailableError,
    UniclusterError,
)
from unicluster.v1.chat_pb2 import ChatInfo, GenerateRequest

log = logging.getLogger("unicluster.engine")


class Engine:
    """Answers up to `users` requests at once and queues up to `queue_limit` more.

    `context` is in tokens, prompt and answer together; `prefill_step` is how many tokens of a
    prompt are computed between two decode steps; `defaults` is the model's
    generation_config.json. The model comes by `set_model`, and is one made on `thread`.
    """

    def __init__(
        self,
        thread: MLXThread,
        tokenizer: Any,
        *,
        model_name: str,
        context: int,
        users: int,
        queue_limit: int | None = None,
        prefill_step: int = 512,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self._thread = thread
        self._tokenizer = tokenizer
        self._name = model_name
        self._context = context
        self._users = users
        self._queue_limit = 4 * users if queue_limit is None else queue_limit
        self._prefill_step = prefill_step
        self._defaults = Sampling.of_model(defaults or {})
        # One at a time: tokenizers may not be shared by threads that change their settings.
        self._checker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")

        self._lock = threading.Lock()  # for what is touched from both sides:
        self._open: set[Ticket] = set()
        self._state = "loading"
        self._failure: UniclusterError | None = UnavailableError(f"{model_name} is still loading")

        # Only for the MLX thread:
        self._lane: Lane | None = None
        self._waiting: deque[Ticket] = deque()
        self._turning = False

    async def submit(self, request: GenerateRequest) -> Ticket:
        """Queues a request.

        Raises InputError that begins with the field's name, NotFoundError for another model,
        BusyError when the queue is full, and UnavailableError while no model works.
        """
        asked = time.perf_counter()
        if request.model not in ("", self._name):
            raise NotFoundError(f"model: {request.model!r} is not served here, {self._name!r} is")
        self._check_room()
        job = await asyncio.get_running_loop().run_in_executor(
            self._checker, check_request, request, self._tokenizer, self._context, self._defaults
        )
        ticket = Ticket(job, asked, on_cancel=self._on_cancel)
        with self._lock:
            self._check_room()
            self._open.add(ticket)
            self._thread.post(partial(self._admit, ticket))
        return ticket

    async def set_model(self, model: Any) -> None:
        """Serves `model` from now on: after loading, and after a failure.

        What runs or waits until then ends with UnavailableError.
        """
        await self._thread.run(partial(self._install, model))

    def fail(self, error: UniclusterError) -> None:
        """Ends every request with `error` and refuses others until `set_model`; any thread."""
        with self._lock:
            self._state, self._failure = "failed", error
            self._thread.post(self._discard_failed)
        self._end_all(error)

    def close(self) -> None:
        """Ends every request with UnavailableError and lets go of the model; any thread."""
        self.fail(UnavailableError(f"{self._name} is shutting down"))
        self._checker.shutdown(wait=False)

    def describe(self) -> ChatInfo:
        """What the engine knows: all but the weights and what lies on other machines."""
        with self._lock:
            detail = "" if self._failure is None else str(self._failure)
            return ChatInfo(
                model=self._name,
                context=self._context,
                users=self._users,
                state=self._state,
                detail=detail,
            )

    def _check_room(self) -> None:
        if self._failure is not None:
            raise UnavailableError(str(self._failure))
        if len(self._open) >= self._users + self._queue_limit:
            raise BusyError(
                f"the queue is full: {self._users} requests run and {self._queue_limit} wait; "
                "try again later"
            )

    def _end_all(self, error: UniclusterError) -> None:
        with self._lock:
            tickets, self._open = self._open, set()
        for ticket in tickets:
            ticket.end(type(error)(*error.args))  # one each: raising writes into an exception

    def _on_cancel(self, ticket: Ticket) -> None:
        self._thread.post(partial(self._forget, ticket))

    # From here on, on the MLX thread.

    def _install(self, model: Any) -> None:
        self._end_all(UnavailableError(f"{self._name} is being loaded again; ask again"))
        self._discard()
        self._lane = Lane(model, self._tokenizer, self._users, self._prefill_step)
        with self._lock:
            self._state, self._failure = "ready", None

    def _discard_failed(self) -> None:
        if self._failure is not None:  # else a new model came first
            self._discard()

    def _discard(self) -> None:
        if self._lane is not None:
            self._lane.close()
        self._lane = None
        self._waiting.clear()
        mx.clear_cache()

    def _admit(self, ticket: Ticket) -> None:
        if not ticket.ended:
            self._waiting.append(ticket)
            self._turn_soon()

    def _forget(self, ticket: Ticket) -> None:
        with self._lock:
            self._open.discard(ticket)
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        elif self._lane is not None:
            self._guarded(partial(self._lane.remove, ticket))

    def _turn_soon(self) -> None:
        if not self._turning:
            self._turning = True
            self._thread.post(self._turn)

    def _turn(self) -> None:
        """One step. While there is work, turns follow one another, with other work between."""
        self._turning = False
        lane = self._lane
        if lane is None:
            return
        self._guarded(partial(self._step, lane))
        if lane or self._waiting:
            self._turn_soon()
        else:
            mx.clear_cache()

    def _step(self, lane: Lane) -> None:
        while self._waiting and not lane.full:
            lane.add(self._waiting.popleft())
        ended = lane.step()
        with self._lock:
            self._open.difference_update(ended)

    def _guarded(self, work: Callable[[], None]) -> None:
        """An error of the model leaves a batch in pieces: all requests end with it."""
        try:
            work()
        except UniclusterError as error:
            # Its traceback holds the batch and with it the caches, and whoever raised it may
            # keep it.
            self.fail(error.with_traceback(None))
        except Exception as error:
            log.exception("the model failed")
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.fail(StageError(f"{self._name} failed while computing: {reason}"))
