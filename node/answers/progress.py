"""How far an answer is: its tokens read one by one, up to the one that ends it."""

from collections.abc import Collection, Sequence
from typing import Any

from node.answers.text import Segment, TextStream
from node.constraints.beginning import Beginning
from unicluster.v1.chat_pb2 import Delta, GenerateEvent

_FIELD_OF = {"normal": "text", "reasoning": "reasoning", "tool": "tool_call"}


class AnswerProgress:
    """Reads one answer's tokens. `count` of them are part of it; `reason`, once it has ended."""

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        marks: Any,
        *,
        max_tokens: int,
        end_tokens: Collection[int],
        beginning: Beginning | None,
        single_tool_call: bool,
    ) -> None:
        """`marks` and `beginning` as of TextStream."""
        self.count = 0
        self.reason = ""  # stop or length
        self._text = TextStream(tokenizer, stop, marks, beginning)
        self._max_tokens = max_tokens
        self._end_tokens = end_tokens
        self._single_tool_call = single_tool_call

    @property
    def stop_string(self) -> str:
        """The stop string that ended the answer, or nothing."""
        return self._text.stop_string

    def is_end(self, token: int) -> bool:
        """Whether a token ends the answer and is no part of it."""
        return token in self._end_tokens

    def add(self, token: int) -> list[Segment]:
        """The text that is certain after one more token: all of it after the last."""
        if self.is_end(token):
            self.reason = "stop"
            return self._text.finish()
        self.count += 1
        segments = self._text.add(token)
        called = self._single_tool_call and any(each.kind == "tool" for each in segments)
        if self._text.stopped or called:
            self.reason = "stop"
        elif self.count == self._max_tokens:
            self.reason = "length"
        return segments + self._text.finish() if self.reason else segments


def events_of(segments: Sequence[Segment]) -> list[GenerateEvent]:
    """One event for each segment of text."""
    events = []
    for kind, text in segments:
        delta = Delta()
        setattr(delta, _FIELD_OF[kind], text)
        events.append(GenerateEvent(delta=delta))
    return events
