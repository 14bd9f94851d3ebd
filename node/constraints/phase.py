"""Where an answer is: in its reasoning, in a header, or in the text that its reader sees."""

from typing import Any

from mlx_lm.generate import TextStateMachine

# mlx-lm states no types.
_Machine: Any = TextStateMachine

TEXT, REASONING, TOOL = "normal", "reasoning", "tool"


class Phase:
    """Follows an answer token by token by the model's own marks, as its text is sorted.

    `marks` is a state of mlx-lm's TextStateMachine, in which the answer begins. `settled`: the text
    has begun, and nothing ends it.
    """

    def __init__(self, tokenizer: Any, marks: Any) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._marks = marks
        self.settled = False

    @property
    def state(self) -> str:
        """Where the next token belongs: "normal", "reasoning", "tool", or a format's other."""
        return TEXT if self.settled else str(self._marks[0])

    @property
    def is_text(self) -> bool:
        """Whether the next token belongs to the text, reasoning, calls and headers apart."""
        return self.state == TEXT

    def settle(self) -> None:
        """The text has begun, and no mark in it ends it: a schema's string may contain one."""
        self.settled = True

    def add(self, token: int) -> None:
        """Takes in the answer's next token."""
        if self.settled:
            return
        self._detokenizer.add_token(token)
        self._marks, _ = _Machine.split(self._marks, self._detokenizer.last_segment)
