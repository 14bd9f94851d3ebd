"""The format in which a family of models writes tool calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Parse = Callable[[str, list[dict[str, Any]]], Any]
# By state: texts that lead from it to another, as mlx-lm's TextStateMachine takes them.
Transitions = Mapping[str, Sequence[tuple[str, str]]]


@dataclass(frozen=True)
class CallFormat:
    """A call is the text between `start` and `end`; without an `end`, up to the answer's.

    `parse` makes one call or several of such a text and the tools in OpenAI's form: {"name",
    "arguments", perhaps "id"}; it raises for what is no call. `transitions`, where there are any,
    tell all states apart that a model's other marks don't, and an answer begins in
    `initial_state`. `closings` end reasoning there: with the next message left open, and with the
    beginning of the text. `plain`: the marks are ordinary text, and calls only where tools are
    offered.
    """

    name: str
    start: str
    end: str
    parse: Parse
    transitions: Transitions = field(default_factory=dict)
    initial_state: str = ""
    closings: tuple[str, str] | None = None
    plain: bool = False
