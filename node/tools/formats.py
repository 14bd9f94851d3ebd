"""Which format of calls a model has, and the marks by which its answers are sorted."""

import importlib
import threading
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from node.mlx.compat import inferred_tool_parser
from node.tools.call_format import CallFormat
from node.tools.own_formats import own_format

# mlx-lm states no types.
_Machine: Any = TextStateMachine
_marks_of: Any = make_text_state_machine


def call_format(tokenizer: Any) -> CallFormat | None:
    """The format that fits a tokenizer of mlx-lm's wrapper; None where none is known.

    mlx-lm's own where it knows the family, also for a tokenizer that is made from a GGUF.
    """
    template = tokenizer.chat_template
    known = own_format(template if isinstance(template, str) else "", tokenizer.get_vocab())
    if tokenizer.has_tool_calling:
        name = tokenizer.tool_parser.__module__.rpartition(".")[2]
    else:
        name = "" if known is not None else inferred_tool_parser(tokenizer)
    if not name:
        return known
    parser = name
    if name == "mistral" and "[ARGS]" in tokenizer.get_vocab():
        name = "mistral_headers"
    module: Any = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    return CallFormat(
        name, module.tool_call_start, module.tool_call_end or "", module.parse_tool_call
    )


def _machine(tokenizer: Any, calls: CallFormat | None, *, with_tools: bool) -> Any:
    """mlx-lm's TextStateMachine by which an answer is sorted into text, reasoning and calls."""
    if calls is None or tokenizer.has_tool_calling:
        return _marks_of(tokenizer)
    transitions: dict[str, list[tuple[str, str]]] = {
        state: list(edges) for state, edges in calls.transitions.items()
    }
    if not transitions:
        starts = [(calls.start, "tool")] if with_tools or not calls.plain else []
        ends = [(calls.end, "normal")] if calls.end else []
        transitions = {"normal": starts, "reasoning": list(starts), "tool": ends}
        if tokenizer.has_thinking:
            transitions["normal"].append((tokenizer.think_start, "reasoning"))
            transitions["reasoning"].append((tokenizer.think_end, "normal"))
    return _Machine(transitions)


class Dialect:
    """How a model's answers are marked: its reasoning and its calls."""

    def __init__(self, tokenizer: Any) -> None:
        self.calls = call_format(tokenizer)
        self._tokenizer = tokenizer
        self._machines = {
            with_tools: _machine(tokenizer, self.calls, with_tools=with_tools)
            for with_tools in (False, True)
        }
        self._making = threading.Lock()

    @property
    def initial_state(self) -> str:
        """The state in which every answer begins; empty where the prompt decides."""
        stated = self._tokenizer.response_initial_state
        return stated or (self.calls.initial_state if self.calls is not None else "")

    @property
    def reasons(self) -> bool:
        """Whether answers may have reasoning apart from their text."""
        harmony = self.calls is not None and "reasoning" in self.calls.transitions
        return harmony or bool(self._tokenizer.has_thinking)

    def closings(self, *, with_tools: bool) -> tuple[str, str]:
        """Marks that close an answer's reasoning, at the first time and at later ones.

        Where calls have a header of their own the model chooses once whether one comes, and then
        the text does.
        """
        if self.calls is not None and self.calls.closings:
            first, last = self.calls.closings
            return (first if with_tools else last), last
        return self._tokenizer.think_end, self._tokenizer.think_end

    def marks(self, state: str, *, with_tools: bool) -> Any:
        """A state of mlx-lm's TextStateMachine for one answer, which begins in `state`.

        From any thread: a machine adds a state that it has not seen, and answers share it.
        """
        with self._making:
            return self._machines[with_tools].make_state(state)
