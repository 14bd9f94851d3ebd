"""From tokens to text: detokenized, cut at stop strings, split into text, reasoning and calls."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlx_lm.generate import TextStateMachine

from node.constraints.beginning import Beginning

# mlx-lm states no types.
_Machine: Any = TextStateMachine


class Segment(NamedTuple):
    """Text of one kind: "normal", "reasoning", or "tool", which is always a whole call."""

    kind: str
    text: str


class StopSearch:
    """Finds the first end of a stop string in text that comes piece by piece: Aho and Corasick's.

    Takes time by the text's length alone, however many stop strings there are, and withholds no
    more than may still become part of one.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._ends = [0]  # characters of the longest string that ends at a node
        for string in strings:
            self._insert(string)
        self._fail = self._links()
        self._node = 0
        self.withheld = ""
        self.matched = ""  # the stop string that cut the text

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is certain after one more piece, and whether a stop string cut it."""
        buffer = self.withheld + text
        for at in range(len(self.withheld), len(buffer)):
            self._node = self._step(self._node, buffer[at])
            if length := self._ends[self._node]:
                self.withheld = ""
                self.matched = buffer[at + 1 - length : at + 1]
                return buffer[: at + 1 - length], True
        certain = len(buffer) - self._depth[self._node]
        self.withheld = buffer[certain:]
        return buffer[:certain], False

    def _insert(self, string: str) -> None:
        node = 0
        for character in string:
            if character not in self._next[node]:
                self._next[node][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._ends.append(0)
            node = self._next[node][character]
        self._ends[node] = len(string)

    def _links(self) -> list[int]:
        """Failure links: for each node that of its longest proper suffix."""
        self._fail = [0] * len(self._next)
        waiting = deque(self._next[0].values())
        while waiting:
            node = waiting.popleft()
            for character, child in self._next[node].items():
                self._fail[child] = self._step(self._fail[node], character)
                self._ends[child] = self._ends[child] or self._ends[self._fail[child]]
                waiting.append(child)
        return self._fail

    def _step(self, node: int, character: str) -> int:
        while node and character not in self._next[node]:
            node = self._fail[node]
        return self._next[node].get(character, 0)


class TextStream:
    """Text of one answer; withholds what may still become part of a stop string or a mark.

    Where its text is constrained, `beginning` knows the token with which that begins: it has no
    marks, and whatever looks like one belongs to it.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        marks: Any,
        beginning: Beginning | None = None,
    ) -> None:
        """`marks`: a state of mlx-lm's TextStateMachine, in which the answer begins."""
        self._detokenizer = tokenizer.detokenizer
        # Stop strings come first and see the raw text, marks included.
        self._stop = StopSearch(stop)
        self._marks = marks
        self._tool = ""
        self._beginning = beginning
        self._read = 0  # characters of the raw text so far
        self._sorted = 0  # of them, those that no stop string can take any more
        self._text_from: int | None = None  # where in the raw text there are no marks any more
        self._settled = False
        self.stopped = False

    @property
    def stop_string(self) -> str:
        """The stop string that ended the answer, or nothing."""
        return self._stop.matched

    def add(self, token: int) -> list[Segment]:
        """The text that is certain after one more token."""
        if self._beginning is not None and self._beginning.add(token) and self._text_from is None:
            self._text_from = self._read
        self._detokenizer.add_token(token)
        return self._pass(self._detokenizer.last_segment)

    def finish(self) -> list[Segment]:
        """All text that was withheld, when the answer ends."""
        segments = []
        if not self.stopped:
            self._detokenizer.finalize()
            segments += self._pass(self._detokenizer.last_segment)
        if not self.stopped:
            segments += self._sort(self._stop.withheld)
        self._marks, rest, kind = _Machine.flush(self._marks)
        segments += self._keep([(kind, rest)])
        if self._tool:
            segments.append(Segment("tool", self._tool))
        return segments

    def _pass(self, text: str) -> list[Segment]:
        self._read += len(text)
        certain, self.stopped = self._stop.add(text)
        return self._sort(certain)

    def _sort(self, text: str) -> list[Segment]:
        if self._settled:
            return self._keep([("normal", text)])
        marked = len(text) if self._text_from is None else self._text_from - self._sorted
        self._sorted += len(text)
        self._marks, parts = _Machine.split(self._marks, text[:marked])
        if len(text) > marked:
            self._settled = True
            self._marks, rest, kind = _Machine.flush(self._marks)
            parts = [*parts, (kind, rest), ("normal", text[marked:])]
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
