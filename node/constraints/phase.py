"""Where an answer is: in its reasoning, in a header, or in the text that its reader sees."""

from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine

# mlx-lm states no types.
_Machine: Any = TextStateMachine
_marks_of: Any = make_text_state_machine


class Phase:
    """Follows an answer token by token by the model's own marks, as its text is sorted.

    `state` is where it begins: "normal", "reasoning", or what the model's response format says.
    """

    def __init__(self, tokenizer: Any, state: str) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._marks = _marks_of(tokenizer).make_state(state)
        self._settled = False

    @property
    def is_text(self) -> bool:
        """Whether the next token belongs to the text, reasoning, calls and headers apart."""
        return self._settled or bool(self._marks[0] == "normal")

    def settle(self) -> None:
        """The text has begun, and no mark in it ends it: a schema's string may contain one."""
        self._settled = True

    def add(self, token: int) -> None:
        """Takes in the answer's next token."""
        if self._settled:
            return
        self._detokenizer.add_token(token)
        self._marks, _ = _Machine.split(self._marks, self._detokenizer.last_segment)


def openings(tokenizer: Any) -> list[list[int]]:
    """Token ids of the marks by which an answer may go over into its reasoning."""
    if not tokenizer.has_thinking:
        return []
    return [list(tokenizer.think_start_tokens)]


def exits(tokenizer: Any) -> set[int]:
    """Tokens that would end an answer, or go over into a tool call, from within its reasoning."""
    calls = (tokenizer.tool_call_start_tokens or ()) if tokenizer.has_tool_calling else ()
    return {*tokenizer.eos_token_ids, *(calls if len(calls) == 1 else ())}
