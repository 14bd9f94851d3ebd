"""Where the text of a constrained answer begins, by its tokens: a mark and its spelling differ."""

from collections.abc import Iterable, Sequence

from node.constraints.phase import TOOL, Phase


class Beginning:
    """Follows an answer to the first token of its text, after which nothing in it is a mark.

    It may begin with one of `marks`, token ids by which it goes over into its reasoning, or into a
    tool call; after calls one of `end_tokens` may end it without a text.
    """

    def __init__(
        self, phase: Phase, marks: Iterable[Sequence[int]], end_tokens: Iterable[int]
    ) -> None:
        self.phase = phase
        self.called = False
        # Marks that the answer may begin with, then what is left of the ones begun.
        self.marks = [list(mark) for mark in marks] if phase.is_text else []
        self.in_mark = False
        self._end_tokens = frozenset(end_tokens)

    def add(self, token: int) -> bool:
        """Takes in the answer's next token, and says whether it belongs to the text."""
        rest = [mark[1:] for mark in self.marks if mark[0] == token]
        self.marks = [mark for mark in rest if mark]
        self.in_mark = bool(self.marks)
        ends = self.called and token in self._end_tokens
        is_text = not rest and self.phase.is_text and not ends
        if is_text:
            self.phase.settle()
        self.phase.add(token)
        self.called |= self.phase.state == TOOL
        return is_text
