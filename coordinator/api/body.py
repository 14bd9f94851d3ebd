"""Bodies of requests: bounded in size and time before they are parsed, and then JSON."""

import asyncio
import json
from collections import Counter
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from coordinator.protocols.errors import BUSY_RETRY, HttpError
from unicluster.cluster.sizes import CHAT_BYTES
from unicluster.errors import shown

# For a whole body to arrive.
BODY_SECONDS = 60.0
# A longer one is parsed in a thread, and only so many at a time: parsed JSON is far larger.
SHORT_BYTES = 256 << 10
LONG_AT_ONCE = 2
# Of long bodies that arrive or wait at the same time, beyond the first SHORT_BYTES of each.
MOST_WAITING_BYTES = 256 << 20


class Bodies:
    """Reads the JSON objects that requests bring, in one event loop."""

    def __init__(self) -> None:
        self._long = asyncio.Semaphore(LONG_AT_ONCE)
        self._waiting = 0  # bytes, of MOST_WAITING_BYTES

    async def read(self, request: Request) -> Any:
        """The JSON value of a request's body.

        Raises HttpError: 413 above CHAT_BYTES, 408 where it takes longer than BODY_SECONDS, 415
        for other than JSON as it is, 429 where many long ones wait, 400 where it is no JSON.
        """
        _check_type(request)
        body = bytearray()
        try:
            return await self._read(request, body)
        finally:
            self._waiting -= max(0, len(body) - SHORT_BYTES)

    async def _read(self, request: Request, body: bytearray) -> Any:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                await self._take(request, body)
        except TimeoutError:
            message = f"the body did not arrive within {BODY_SECONDS:.0f} s"
            raise HttpError(408, message, headers={"Connection": "close"}) from None
        except ClientDisconnect:
            raise HttpError(400, "the client left before its body was complete") from None
        if len(body) <= SHORT_BYTES:
            return parsed(body)
        async with self._long:
            return await asyncio.to_thread(parsed, body)

    async def _take(self, request: Request, body: bytearray) -> None:
        """Adds to `body` as it arrives, and counts it."""
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > CHAT_BYTES:
            raise _too_large()
        async for piece in request.stream():
            before = max(0, len(body) - SHORT_BYTES)
            body += piece
            self._waiting += max(0, len(body) - SHORT_BYTES) - before
            if len(body) > CHAT_BYTES:
                raise _too_large()
            if self._waiting > MOST_WAITING_BYTES:
                raise HttpError(
                    429,
                    "too many long requests arrive at once: try again later",
                    kind="rate_limit_error",
                    headers={"Connection": "close", "Retry-After": str(BUSY_RETRY)},
                )


def parsed(body: bytes | bytearray) -> Any:
    """The value of JSON in UTF-8. Raises HttpError with status 400 where it is none."""
    try:
        return json.loads(
            body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_once_each
        )
    except RecursionError:
        raise HttpError(400, "the body is no JSON: it is nested too deeply") from None
    except UnicodeDecodeError:
        raise HttpError(400, "the body is no JSON: it is not UTF-8") from None
    except ValueError as error:
        raise HttpError(400, f"the body is no JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Of a field that is there twice one would be ignored."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"{shown(names.most_common(1)[0][0])} is there twice in an object")
    return values


def _check_type(request: Request) -> None:
    """Browsers send forms and plain text for pages of other sites without asking; JSON they don't.

    Programs may leave the type out: curl says that all is a form.
    """
    headers = request.headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = kind == "application/json" or kind.endswith("+json")
    if not is_json and ("origin" in headers or "sec-fetch-site" in headers):
        raise HttpError(415, "the Content-Type must be application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "the Content-Encoding must be identity: compressed bodies are refused")


def _too_large() -> HttpError:
    # The rest of the body is not read: the connection is of no more use.
    message = f"the body is larger than {CHAT_BYTES} bytes"
    return HttpError(413, message, headers={"Connection": "close"})
