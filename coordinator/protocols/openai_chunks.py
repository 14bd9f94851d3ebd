"""The end of a stream of OpenAI's completions, of chats and of plain text alike."""

from collections import defaultdict

from coordinator.protocols.asked import Json, Stamp, sse
from coordinator.protocols.openai_fields import usage_json
from unicluster.client.reasoning import ReasoningTokens
from unicluster.v1.chat_pb2 import GenerateEvent, Usage

DONE = b"data: [DONE]\n\n"


class Chunks:
    """The chunks of a stream; with `include_usage` the last one says what was used.

    kind: the type of object that a chunk is.
    """

    def __init__(self, stamp: Stamp, kind: str, include_usage: bool) -> None:
        self._stamp = stamp
        self._kind = kind
        self._include_usage = include_usage
        self._usages: dict[int, Usage] = {}
        self._reasoned: dict[int, ReasoningTokens] = defaultdict(ReasoningTokens)

    def one(self, choice: Json) -> bytes:
        """The chunk with that choice."""
        chunk = {**head(self._stamp, self._kind), "choices": [choice]}
        return sse(chunk | {"usage": None} if self._include_usage else chunk)

    def note(self, index: int, event: GenerateEvent) -> None:
        """Notes what an event of the answer number `index` says of usage."""
        if event.HasField("finish"):
            self._usages[index] = event.finish.usage
        else:
            self._reasoned[index].add(event.delta)

    def end(self) -> bytes:
        if not self._include_usage or not self._usages:
            return DONE
        usages = [self._usages[index] for index in sorted(self._usages)]
        usage = usage_json(usages, sum(each.count for each in self._reasoned.values()))
        return sse({**head(self._stamp, self._kind), "choices": [], "usage": usage}) + DONE


def head(stamp: Stamp, kind: str) -> Json:
    """The first fields of an answer, or of a chunk of it."""
    return {"id": stamp.id, "object": kind, "created": stamp.created, "model": stamp.model}
