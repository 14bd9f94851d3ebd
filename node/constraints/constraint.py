"""A constraint on an answer's text: it must match a grammar."""

from collections.abc import Callable, Iterable, Sequence

from llguidance import LLMatcher

from node.constraints.beginning import Beginning
from node.constraints.mask import Allowed, Mask
from node.constraints.numbers import NumberLimit


class TextConstraint(Mask):
    """Lets an answer's text match a grammar.

    Its reasoning is free, but that it must end: the grammar begins with the text. After tool calls
    it may end without a text. `beginning` makes one that stands before the answer.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        beginning: Callable[[], Beginning],
        prompt_tokens: int,
        vocabulary: int,
        leaving: Iterable[int] = (),
        end_tokens: Iterable[int] = (),
        numbers: NumberLimit | None = None,
    ) -> None:
        """`leaving`: tokens by which reasoning would end without a text to follow."""
        super().__init__(matcher, prompt_tokens, vocabulary, numbers)
        self.beginning = beginning
        self._begun = beginning()
        self._free = self._but(leaving)
        self._end_tokens = list(end_tokens)

    def allowed(self, drafts: Sequence[int]) -> int:
        if not self._begun.phase.is_text or self.error is not None or self._begun.marks:
            return len(drafts)
        return int(self._matcher.validate_tokens(list(drafts)))

    @property
    def text_has_begun(self) -> bool:
        """Whether there can be no reasoning any more."""
        return self._begun.phase.settled

    def _take(self, token: int) -> None:
        if self._begun.add(token) and self.error is None:
            self._consume(token)

    def _next_mask(self) -> Allowed | None:
        begun = self._begun
        if begun.in_mark:
            mask = self._only(())
        elif self.error is not None:
            return None
        elif not begun.phase.is_text:
            return None if begun.called else self._free
        else:
            mask = self._of_grammar()
            mask[self._end_tokens] |= begun.called
        mask[[mark[0] for mark in begun.marks]] = True
        return mask
