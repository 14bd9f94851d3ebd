"""A constraint on an answer's tool calls: that there are any, and that they match a grammar."""

from collections.abc import Callable, Sequence

from llguidance import LLMatcher

from node.constraints.mask import Allowed, Mask
from node.constraints.numbers import NumberLimit
from node.constraints.phase import REASONING, TOOL, Phase

Marks = list[list[int]]


class CallConstraint(Mask):
    """Lets the text of each call match a grammar, and an answer end only after a call.

    `starts` gives, by the answer's state and whether it is its first, the token ids of the marks
    that lead to a call or to reasoning. `end` are those of the mark after a call, none where the
    answer ends with it. Unless `required`, only the calls themselves are constrained.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        phase: Phase,
        prompt_tokens: int,
        vocabulary: int,
        *,
        starts: Callable[[str, bool], Marks],
        end: Sequence[int],
        end_tokens: Sequence[int],
        required: bool,
        numbers: NumberLimit,
    ) -> None:
        super().__init__(matcher, prompt_tokens, vocabulary, numbers)
        self._phase = phase
        self._starts = starts
        self._end = list(end)
        self._end_tokens = list(end_tokens)
        self._required = required
        self._first = True  # no token has come yet
        self._calls = 0
        self._pending: Marks = []  # what is left of the marks that have begun

    def allowed(self, drafts: Sequence[int]) -> int:
        if self._phase.state == TOOL and not self._pending and self.error is None:
            return int(self._matcher.validate_tokens(list(drafts)))
        return 0 if self._pending or self._forced else len(drafts)

    @property
    def _forced(self) -> bool:
        """Whether the next token must lead on to a call, or end an answer that has made one."""
        return self._required and self._phase.state not in (TOOL, REASONING)

    def _take(self, token: int) -> None:
        before = self._phase.state
        marks = self._pending
        if not marks and before == TOOL:
            if self._end and token == self._end[0] and self._matcher.is_accepting():
                marks = [self._end]
            else:
                self._consume(token)
        elif not marks and self._forced:
            marks = self._starts(before, self._first)
        self._pending = [mark[1:] for mark in marks if mark[0] == token and mark[1:]]
        self._first = False
        self._phase.add(token)
        if self._phase.state == TOOL and before != TOOL:
            self._calls += 1
            self._matcher.reset()

    def _next_mask(self) -> Allowed | None:
        if self._pending:
            return self._only(mark[0] for mark in self._pending)
        if self._phase.state == TOOL:
            mask = self._of_grammar()
            if self._end:
                may_end = bool(mask[self._end_tokens].any())
                mask[self._end_tokens] = False
                mask[self._end[0]] |= may_end
            return mask
        if not self._required:
            return None
        if self._phase.state == REASONING:
            return self._but(self._end_tokens)
        starts = [mark[0] for mark in self._starts(self._phase.state, self._first)]
        return self._only([*starts, *(self._end_tokens if self._calls else ())])
