"""The one thread that touches MLX in a process; it never runs network code."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class MLXThread:
    """Runs posted actions one after another, in order."""

    def __init__(self) -> None:
        self._actions: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="mlx", daemon=True).start()

    def post(self, action: Callable[[], object]) -> None:
        """Queues an action, which must not raise; callable from any thread."""
        self._actions.put(action)

    async def run(self, action: Callable[[], T]) -> T:
        """Runs `action` there and gives its result, or raises what it raised, here."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]

        def attempt() -> None:
            try:
                result = action()
            except BaseException as error:
                loop.call_soon_threadsafe(settle, None, error)
            else:
                loop.call_soon_threadsafe(settle, result, None)

        self.post(attempt)
        return await done

    def _work(self) -> None:
        while True:
            self._actions.get()()
