"""Limits of a chat request, field by field, that hold whatever the model is.

The gateway and the head both check them before they do anything with the request.
"""

from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import GenerateRequest

MOST_MESSAGES = 4096
# UTF-8 of all contents together.
MOST_TEXT_BYTES = 12 << 20
MOST_TOKENS = 1 << 20
MOST_STOP = 64
MOST_STOP_CHARACTERS = 512
MOST_LOGPROBS = 20
NAME_CHARACTERS = 4096
ROLES = ("system", "user", "assistant", "tool")


def check_limits(request: GenerateRequest) -> None:
    """Raises InputError, which begins with the field's name, for what no model takes."""
    _at_most("model", len(request.model), NAME_CHARACTERS, "characters")
    _at_most("messages", len(request.messages), MOST_MESSAGES, "messages")
    for number, message in enumerate(request.messages, start=1):
        if message.role not in ROLES:
            raise InputError(
                f"messages: the role of message {number} must be one of {', '.join(ROLES)}, "
                f"got {message.role[:40]!r}"
            )
    _at_most("messages", text_bytes(request), MOST_TEXT_BYTES, "bytes of text")
    _at_most("token_ids", len(request.token_ids), MOST_TOKENS, "tokens")
    _at_most("stop", len(request.stop), MOST_STOP, "strings")
    for stop in request.stop:
        if not stop:
            raise InputError("stop: must not contain an empty string")
        _at_most("stop", len(stop), MOST_STOP_CHARACTERS, "characters in a string")
    if request.HasField("logprobs") and request.logprobs > MOST_LOGPROBS:
        raise InputError(f"logprobs: must be at most {MOST_LOGPROBS}, got {request.logprobs}")
    if request.HasField("max_tokens") and request.max_tokens == 0:
        raise InputError("max_tokens: must be at least 1, got 0")


def text_bytes(request: GenerateRequest) -> int:
    """Bytes of the contents of all messages, in UTF-8."""
    return sum(len(message.content.encode()) for message in request.messages)


def _at_most(field: str, count: int, most: int, unit: str) -> None:
    if count > most:
        raise InputError(f"{field}: {count} {unit}, and at most {most}")
