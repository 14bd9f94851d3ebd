"""A limit of an answer's reasoning: then it is closed by the model's own mark."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from node.constraints.mask import Allowed, Filter
from node.constraints.phase import REASONING, TEXT, Phase


class ReasoningBudget(Filter):
    """Lets an answer reason for `most` tokens at most, marks apart, however often it begins.

    `closings` are token ids that close reasoning: at the first time, and at every later one. Once
    the budget is used up none of the `openings` comes, tokens by which text goes over to reasoning.
    `text_has_begun` says when whatever looks like a mark is text.
    """

    def __init__(
        self,
        phase: Phase,
        prompt_tokens: int,
        vocabulary: int,
        most: int,
        closings: tuple[Sequence[int], Sequence[int]],
        openings: Sequence[int] = (),
    ) -> None:
        super().__init__(prompt_tokens, vocabulary)
        self.text_has_begun: Callable[[], bool] = lambda: False
        self._phase = phase
        self._left = most
        self._closings = [list(closing) for closing in closings]
        self._openings = list(openings)
        self._mark = self._closings[0]
        self._begun = 0  # tokens of the mark that have come, whoever chose them
        self._forced: list[int] = []  # what is left of a mark that was begun here
        self._closed = False  # the mark was complete, and its end is not seen yet

    @property
    def _spent(self) -> bool:
        return self._left <= 0

    def allowed(self, drafts: Sequence[int]) -> int:
        return 0 if self._forced else len(drafts)

    def _take(self, token: int) -> None:
        if self.text_has_begun():
            self._forced, self._openings = [], []
            self._phase.settle()
            return
        reasons = False
        if self._forced:
            self._forced = self._forced[1:] if token == self._forced[0] else []
            self._closed = not self._forced
        elif reasons := self._phase.state == REASONING:
            self._begun = _overlap([*self._mark[: self._begun], token], self._mark)
        else:
            self._begun = 0
        self._phase.add(token)
        self._left -= reasons and self._phase.state == REASONING
        self._closed = self._closed and self._phase.state == REASONING

    def _force(self) -> None:
        self._forced = self._mark[self._begun :]
        self._mark, self._begun = self._closings[1], 0

    def _next_mask(self) -> Allowed | None:
        reasons = self._phase.state == REASONING
        if self._spent and reasons and not self._forced and not self._closed:
            self._force()
        if self._forced:
            return self._only(self._forced[:1])
        if self._spent and self._openings and self._phase.state == TEXT:
            return self._but(self._openings)
        return None

    def narrow(self, allowed: Allowed | None) -> Allowed | None:
        return self._mask if self._forced else super().narrow(allowed)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        masked = super().__call__(tokens, logits)
        if not self._forced or logits.shape[-1] == 1:
            return masked
        # Whatever else is asked of the answer, this token comes.
        return mx.where(mx.arange(logits.shape[-1]) == self._forced[0], 0.0, -mx.inf)[None]


def _overlap(tokens: Sequence[int], mark: Sequence[int]) -> int:
    """The most of the last `tokens` that a mark begins with, and is not complete with."""
    for count in range(min(len(tokens), len(mark) - 1), 0, -1):
        if list(tokens[-count:]) == list(mark[:count]):
            return count
    return 0
