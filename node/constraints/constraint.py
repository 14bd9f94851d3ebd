"""A constraint on an answer's text: it must match a grammar."""

from collections.abc import Iterable, Sequence

from llguidance import LLMatcher

from node.constraints.mask import Allowed, Mask
from node.constraints.phase import TOOL, Phase


class TextConstraint(Mask):
    """Lets an answer's text match a grammar.

    Its reasoning is free, but that it must end: the grammar begins with the text. An answer may
    begin with one of `marks`, token ids by which it goes over into its reasoning, or into a tool
    call; after calls it may end without a text.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        phase: Phase,
        prompt_tokens: int,
        vocabulary: int,
        marks: Iterable[Sequence[int]] = (),
        leaving: Iterable[int] = (),
        end_tokens: Iterable[int] = (),
    ) -> None:
        """`leaving`: tokens by which reasoning would end without a text to follow."""
        super().__init__(matcher, prompt_tokens, vocabulary)
        self._phase = phase
        # Marks that the answer may begin with, then what is left of the ones begun.
        self._marks = [list(mark) for mark in marks] if phase.is_text else []
        self._in_mark = False
        self._free = self._but(leaving)
        self._end_tokens = list(end_tokens)
        self._called = False

    def allowed(self, drafts: Sequence[int]) -> int:
        if not self._applies or self._marks:
            return len(drafts)
        return int(self._matcher.validate_tokens(list(drafts)))

    @property
    def text_has_begun(self) -> bool:
        """Whether there can be no reasoning any more."""
        return self._phase.settled

    @property
    def _applies(self) -> bool:
        """Whether the grammar says anything of the next token."""
        return self._phase.is_text and self.error is None

    def _take(self, token: int) -> None:
        rest = [mark[1:] for mark in self._marks if mark[0] == token]
        if rest:
            self._marks = [mark for mark in rest if mark]
            self._in_mark = bool(self._marks)
        else:
            self._marks = []
            if self._applies and not (self._called and token in self._end_tokens):
                self._consume(token)
                self._phase.settle()
        self._phase.add(token)
        self._called |= self._phase.state == TOOL

    def _next_mask(self) -> Allowed | None:
        starts = [mark[0] for mark in self._marks]
        if self._in_mark:
            mask = self._only(())
        elif self.error is not None:
            return None
        elif not self._phase.is_text:
            return None if self._called else self._free
        else:
            mask = self._of_grammar()
            mask[self._end_tokens] |= self._called
        mask[starts] = True
        return mask
