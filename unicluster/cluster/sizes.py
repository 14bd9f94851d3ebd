"""Sizes of messages, by service, and the check of each before it is parsed.

gRPC refuses by length what is larger than the largest message of a server. The rest is checked
here, on the bytes: a few bytes of a message can become a hundred when they are parsed.
"""

import logging
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from unicluster.cluster.handlers import Context, Handler, Interceptor, checked
from unicluster.v1 import chat_pb2, node_pb2, stage_pb2, weights_pb2

log = logging.getLogger(__name__)

# Requests to agents, and what they answer: layouts of large models, lists of files held.
CONTROL_BYTES = 8 << 20
# A chat: whole conversations, as text.
CHAT_BYTES = 16 << 20
# A frame of the ring: a prefill chunk has 8 MiB of hidden states, a saved layer of a cache more.
FRAME_BYTES = 64 << 20
# Back at the head from the last stage, in answer to its own frame: logits of all users of a lane.
RESULT_BYTES = 1 << 30

_BY_SERVICE = {
    node_pb2.DESCRIPTOR.services_by_name["Node"]: CONTROL_BYTES,
    weights_pb2.DESCRIPTOR.services_by_name["Weights"]: 1 << 20,
    stage_pb2.DESCRIPTOR.services_by_name["Stage"]: FRAME_BYTES,
    chat_pb2.DESCRIPTOR.services_by_name["Head"]: 1 << 20,
    chat_pb2.DESCRIPTOR.services_by_name["Chat"]: CHAT_BYTES,
}
# An agent says a few dozen addresses of its own.
GREETING_BYTES = 8 << 10
_BY_METHOD = {"/unicluster.v1.Node/Greet": GREETING_BYTES}
_METHODS = {
    (path := f"/{service.full_name}/{method.name}"): (
        _BY_METHOD.get(path, most),
        method.input_type,
    )
    for service, most in _BY_SERVICE.items()
    for method in service.methods
}

# Fields of a request, those of its parts included: a parsed one takes some 60 bytes.
MOST_FIELDS = 1 << 15
# Of a list of numbers: one takes a byte on the wire, and eight when it is parsed.
MOST_PACKED_BYTES = 4 << 20
# A smaller message is small when it is parsed, too: its fields are not counted.
COUNTED_ABOVE = 256 << 10

_PLAIN = {
    FieldDescriptor.TYPE_STRING,
    FieldDescriptor.TYPE_BYTES,
    FieldDescriptor.TYPE_MESSAGE,
}


@dataclass(frozen=True)
class TooLarge:
    """Stands for a message that was not parsed, because of `reason`."""

    reason: str


class SizeCheck(Interceptor):
    """Refuses requests larger than those of their service with RESOURCE_EXHAUSTED.

    A stream with such a message ends there: it is read as TooLarge, which no service knows.
    """

    def wrapped(self, handler: Handler, method: str) -> Handler:
        if (known := _METHODS.get(method)) is None:
            return handler
        parse, (most, descriptor) = handler.request_deserializer, known

        def deserialize(data: bytes) -> Any:
            if reason := too_large(data, descriptor, most):
                log.warning("%s: refused: %s", method, reason)
                return TooLarge(reason)
            return parse(data) if parse is not None else data

        return checked(handler, _refuse, deserialize)


async def _refuse(request: Any, context: Context) -> None:
    if isinstance(request, TooLarge):
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, request.reason)


def too_large(data: bytes, message: Descriptor, most: int) -> str:
    """Why a serialized message is not parsed; empty if it is."""
    if len(data) > most:
        return f"a message of {len(data)} bytes, and at most {most} are accepted"
    if len(data) <= COUNTED_ABOVE:
        return ""
    return _miscounted(data, message)


def _miscounted(data: bytes, message: Descriptor) -> str:
    """Walks over the fields, no further than MOST_FIELDS. What is no message is left to protobuf:
    its parser ends at the same byte.
    """
    fields, parts = 0, [(0, len(data), message)]
    while parts:
        at, end, kind = parts.pop()
        while at < end:
            fields += 1
            if fields > MOST_FIELDS:
                return f"a message of more than {MOST_FIELDS} fields"
            try:
                key, at = _varint(data, at)
                number, wire_type = key >> 3, key & 7
                if wire_type == 0:
                    _, at = _varint(data, at)
                elif wire_type in (1, 5):
                    at += 8 if wire_type == 1 else 4
                elif wire_type == 2:
                    size, start = _varint(data, at)
                    at = start + size
                    if at > end:
                        return ""
                    field = kind.fields_by_number.get(number)
                    if field is None:
                        continue
                    if field.message_type is not None:
                        parts.append((start, at, field.message_type))
                    elif field.type not in _PLAIN and size > MOST_PACKED_BYTES:
                        return f"{field.name}: {size} bytes, and at most {MOST_PACKED_BYTES}"
                else:
                    return ""  # groups, which none of our messages has
            except IndexError:
                return ""
    return ""


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A varint's value and where the next byte is. Raises IndexError if it is cut off."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 or shift > 63:
            return value, at
        shift += 7
