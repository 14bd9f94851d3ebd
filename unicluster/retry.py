"""One policy for trying again: pauses that double, with jitter, up to a longest one, and logged."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import tenacity

log = logging.getLogger(__name__)

Errors = Callable[[BaseException], bool]


def attempts(
    work: str,
    may_pass: Errors,
    *,
    first: float,
    last: float,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> tenacity.AsyncRetrying:
    """Attempts without end, until one succeeds or raises what does not pass by itself.

        async for attempt in attempts("MQTT", lambda e: isinstance(e, OSError), first=1, last=60):
            with attempt:
                ...

    Args:
        work: its name, for the log.
        may_pass: whether another attempt may go better after that error; others are raised.
        first, last: seconds; each pause is between a half and the whole of first, twice first,
            and so on up to last.
        pause: waits for so many seconds, or less when something has changed.
    """
    return tenacity.AsyncRetrying(
        sleep=lambda seconds: pause(float(seconds)),
        wait=_pauses(first, last),
        retry=tenacity.retry_if_exception(may_pass),
        before_sleep=_logging(work),
        reraise=True,
    )


def attempts_in_thread(
    work: str, may_pass: Errors, *, count: int, first: float, last: float
) -> tenacity.Retrying:
    """At most `count` attempts for code without an event loop; the last one's error is raised."""
    return tenacity.Retrying(
        sleep=time.sleep,
        stop=tenacity.stop_after_attempt(count),
        wait=_pauses(first, last),
        retry=tenacity.retry_if_exception(may_pass),
        before_sleep=_logging(work),
        reraise=True,
    )


def succeeded(attempt: tenacity.AttemptManager) -> None:
    """Pauses begin with the first again: the attempt was a success, and what broke came later."""
    attempt.retry_state.attempt_number = 1


def _pauses(first: float, last: float) -> tenacity.wait.wait_base:
    """Half of it is fixed and half random, so that machines don't try at the same moment."""
    return tenacity.wait_exponential(multiplier=first / 2, max=last / 2) + (
        tenacity.wait_random_exponential(multiplier=first / 2, max=last / 2)
    )


def _logging(work: str) -> Callable[[tenacity.RetryCallState], None]:
    def before_sleep(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        log.info("%s: %s; trying again in %.1f s", work, error, state.upcoming_sleep)

    return before_sleep
