"""Who may ask over HTTP: keys, and the limits of each."""

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request

from coordinator.protocols.errors import HttpError
from coordinator.state.keys import Key, Keys
from unicluster.chat_limits import text_bytes
from unicluster.trust.role import audit
from unicluster.v1.chat_pb2 import GenerateEvent, GenerateRequest

MINUTE = 60.0
# A prompt counts as so many bytes a token until the head has counted it.
BYTES_PER_TOKEN = 4


@dataclass
class _Use:
    """Use of one key: answers that run, and tokens of the last minute with their times."""

    running: int = 0
    tokens: deque[tuple[float, int]] = field(default_factory=deque)

    def tokens_since(self, start: float) -> int:
        while self.tokens and self.tokens[0][0] <= start:
            self.tokens.popleft()
        return sum(count for _, count in self.tokens)


class Doorman:
    """Checks the key of each request against `keys`, and counts what each key uses.

    is_open: whether whoever asks is let in while there is no key at all, as on the loopback
    address. clock: seconds, for the minutes of limits.
    """

    def __init__(
        self, keys: Keys, *, is_open: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys = keys
        self._is_open = is_open
        self._clock = clock
        self._uses: dict[str, _Use] = defaultdict(_Use)

    def key_of(self, request: Request) -> Key | None:
        """The key that a request shows; None where none is needed.

        Raises HttpError with status 401 where it shows no good one.
        """
        secret = _secret_of(request)
        key = self._keys.find(secret) if secret else None
        if key is not None:
            state = key.state(time.time())
            if state == "good":
                return key
            audit.warning("key %s (%s) is %s: refused", key.id, key.name, state)
            raise _unauthorized(f"this key is {state}")
        if self._is_open and not self._keys.any():
            return None
        raise _unauthorized("this key is not known" if secret else "a key is needed")

    def check_model(self, key: Key | None, names: Collection[str]) -> None:
        """Raises HttpError with status 403 where the key does not allow the model of `names`."""
        allowed = None if key is None else key.limits.models
        if allowed is not None and not set(allowed) & set(names):
            raise HttpError(403, "this key does not allow this model", code="model_refused")

    @contextlib.contextmanager
    def admitted(self, key: Key | None, requests: Sequence[GenerateRequest]) -> Iterator["Meter"]:
        """Counts answers and tokens of a key while the block runs.

        Raises HttpError with status 429 where a limit of the key is reached.
        """
        if key is None:
            yield Meter(_Use(), self._clock)
            return
        use = self._uses[key.id]
        limits = key.limits
        if limits.most_running is not None and use.running + len(requests) > limits.most_running:
            message = f"this key allows {limits.most_running} answers at the same time"
            raise _limited(message, 1)
        if limits.tokens_per_minute is not None:
            self._check_tokens(use, limits.tokens_per_minute)
        use.running += len(requests)
        meter = Meter(use, self._clock)
        meter.begin(requests)
        try:
            yield meter
        finally:
            use.running -= len(requests)

    def _check_tokens(self, use: _Use, most: int) -> None:
        now = self._clock()
        left = use.tokens_since(now - MINUTE) - most
        if left < 0:
            return
        for at, count in use.tokens:
            left -= count
            if left < 0:
                message = f"this key allows {most} tokens a minute"
                raise _limited(message, max(1, int(at + MINUTE - now) + 1))


class Meter:
    """Counts the tokens of one HTTP request for the key that it came with."""

    def __init__(self, use: _Use, clock: Callable[[], float]) -> None:
        self._use = use
        self._clock = clock
        self._guessed: list[int] = []

    def begin(self, requests: Sequence[GenerateRequest]) -> None:
        """Counts the prompts by their bytes: whoever leaves early has used them, too."""
        self._guessed = [
            len(request.token_ids) + text_bytes(request) // BYTES_PER_TOKEN for request in requests
        ]
        self._note(sum(self._guessed))

    def count(self, index: int, event: GenerateEvent) -> None:
        """Counts the tokens of an event of the answer number `index`."""
        self._note(len(event.delta.token_ids))
        if event.HasField("finish") and self._guessed:
            self._note(event.finish.usage.prompt_tokens - self._guessed[index])

    def _note(self, tokens: int) -> None:
        now, noted = self._clock(), self._use.tokens
        if not tokens:
            return
        if noted and now - noted[-1][0] < 1:  # a second is as fine as it needs to be
            noted[-1] = (noted[-1][0], noted[-1][1] + tokens)
        else:
            noted.append((now, tokens))
            while noted[0][0] <= now - MINUTE:
                noted.popleft()


def _secret_of(request: Request) -> str:
    """As OpenAI's clients send it, or Anthropic's."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return secret.strip()
    return request.headers.get("x-api-key", "").strip()


def _unauthorized(message: str) -> HttpError:
    return HttpError(
        401,
        f"{message}: make one with `unicluster key create` where `serve` runs, and send it as "
        "the API key",
        kind="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _limited(message: str, seconds: int) -> HttpError:
    return HttpError(
        429,
        f"{message}: try again in {seconds} s",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )
