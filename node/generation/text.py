"""From tokens to text: detokenized, cut at stop strings, sorted into what it is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mlx_lm.generate import TextStateMachine, make_text_state_machine

# mlx-lm states no types.
_Machine: Any = TextStateMachine
_marks_of: Any = make_text_state_machine


class Segment(NamedTuple):
    """Text of one kind: "normal", "reasoning", or "tool", which is always a whole call."""

    kind: str
    text: str


class TextStream:
    """One answer's text. What may still become part of a stop string or a mark is held back."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], state: str) -> None:
        self._detokenizer = tokenizer.detokenizer
        # Stop strings come first and see the raw text, marks included.
        self._stop = _Machine({"normal": [(s, None) for s in stop]}).make_state()
        self._marks = _marks_of(tokenizer).make_state(state)
        self._tool = ""
        self.stopped = False

    def add(self, token: int) -> list[Segment]:
        """The text that is certain after one more token."""
        self._detokenizer.add_token(token)
        return self._pass(self._detokenizer.last_segment)

    def finish(self) -> list[Segment]:
        """All that was held back, when the answer ends."""
        segments = []
        if not self.stopped:
            self._detokenizer.finalize()
            segments += self._pass(self._detokenizer.last_segment)
        if not self.stopped:
            self._stop, held, _ = _Machine.flush(self._stop)
            segments += self._sort(held)
        self._marks, held, kind = _Machine.flush(self._marks)
        segments += self._keep([(kind, held)])
        if self._tool:
            segments.append(Segment("tool", self._tool))
        return segments

    def _pass(self, text: str) -> list[Segment]:
        self._stop, parts = _Machine.split(self._stop, text)
        last_state, _ = parts[-1]
        self.stopped = last_state is None
        return self._sort("".join(part for _, part in parts))

    def _sort(self, text: str) -> list[Segment]:
        self._marks, parts = _Machine.split(self._marks, text)
        return self._keep(parts)

    def _keep(self, parts: Sequence[tuple[str, str]]) -> list[Segment]:
        segments = []
        for kind, text in parts:
            if kind == "tool":
                self._tool += text
                continue
            if self._tool:
                segments.append(Segment("tool", self._tool))
                self._tool = ""
            # Other kinds, such as headers, are no part of the answer.
            if text and kind in ("normal", "reasoning"):
                segments.append(Segment(kind, text))
        return segments
