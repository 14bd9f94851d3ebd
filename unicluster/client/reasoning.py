"""How many tokens of an answer are reasoning."""

from typing import Any


class ReasoningTokens:
    """Counts tokens of reasoning, delta by delta, of the client's deltas or of those of the wire.

    A delta without any text has tokens whose text is held back, as of a mark that may be one:
    they count with the text that comes next.
    """

    def __init__(self) -> None:
        self.count = 0
        self._waiting = 0

    def add(self, delta: Any) -> None:
        tokens = len(delta.token_ids)
        if not (delta.reasoning or delta.text or delta.tool_call or delta.calls):
            self._waiting += tokens
            return
        if delta.reasoning:
            self.count += self._waiting + tokens
        self._waiting = 0
