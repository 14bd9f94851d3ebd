"""The seam between doors and protocols: a request as it was understood, and how it is answered."""

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from coordinator.protocols.errors import Failure
from unicluster.client.answers import Answer
from unicluster.v1.chat_pb2 import GenerateEvent, GenerateRequest

Json = dict[str, Any]

EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
# Keeps a connection alive through a long prefill: clients pass over it.
COMMENT = b": waiting\n\n"


def comment(text: str) -> bytes:
    """A line of a stream of EVENTS that is for people: clients pass over it."""
    return f": {' '.join(text.split())}\n\n".encode()


class Reply(Protocol):
    """One protocol's form of the answer to one request. Holds the state of its stream."""

    media_type: str  # of a stream
    waiting: bytes  # sent while nothing else is; may be empty

    def whole(self, answers: Sequence[Answer]) -> Json:
        """The JSON of complete answers, one for each choice."""

    def begin(self) -> bytes:
        """The first bytes of a stream."""

    def event(self, index: int, event: GenerateEvent) -> bytes:
        """The part of the stream for one event of the answer number `index`."""

    def end(self) -> bytes:
        """The end of a stream, after the last event of all answers."""

    def failed(self, failure: Failure) -> bytes:
        """The end of a stream that an error breaks off."""


@dataclass(frozen=True)
class Asked:
    """A request that was understood: `count` answers to `request`, in the form of `reply`.

    No answer is asked for where the client wants to know only that the model can give one.

    context: tokens of prompt and answer together that must be served, 0 for any. names: of fields
    in the client's protocol, by those of GenerateRequest, where they differ.
    """

    request: GenerateRequest
    reply: Reply
    stream: bool = False
    count: int = 1
    context: int = 0
    names: Mapping[str, str] = field(default_factory=dict)

    def requests(self) -> list[GenerateRequest]:
        """One request for each answer; with a seed, each has another one."""
        copies = []
        for index in range(self.count):
            copy = GenerateRequest()
            copy.CopyFrom(self.request)
            if copy.sampling.HasField("seed"):
                copy.sampling.seed = (copy.sampling.seed + index) % (1 << 64)
            copies.append(copy)
        return copies


@dataclass(frozen=True)
class Stamp:
    """Name and time of an answer, and the name of the model that gives it."""

    id: str
    created: int  # seconds since 1970 UTC
    model: str


def stamp(prefix: str, model: str) -> Stamp:
    """A new one: the id is `prefix` and 24 random characters."""
    return Stamp(prefix + secrets.token_hex(12), int(time.time()), model)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def sse(value: Json, event: str = "") -> bytes:
    """An event of a stream for EventSource and its like."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {as_json(value)}\n\n".encode()


def joined(parts: Iterable[bytes]) -> bytes:
    return b"".join(parts)
