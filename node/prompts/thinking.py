"""Reasoning as a request wants it: by the chat template's own variables, else by a budget."""

from collections.abc import Collection
from typing import Any

from unicluster.errors import InputError, shown
from unicluster.v1.chat_pb2 import GenerateRequest

# Tokens of reasoning, for templates that know no effort; None: as many as the model likes.
EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 1024,
    "medium": 4096,
    "high": None,
}
# Names that templates have for whether to reason.
SWITCHES = ("enable_thinking", "thinking")

Wishes = dict[str, dict[str, Any]]


def wishes_of(request: GenerateRequest) -> Wishes:
    """Template variables that a request sets where the template has them, by the field's name."""
    reasoning, wishes = request.reasoning, Wishes()
    enabled = _enabled(request)
    if enabled is None and reasoning.HasField("most_tokens"):
        enabled = reasoning.most_tokens > 0
    if enabled is not None:
        wishes["enabled"] = dict.fromkeys(SWITCHES, enabled)
    if reasoning.effort not in ("", "none"):
        wishes["effort"] = {"reasoning_effort": reasoning.effort}
    return wishes


def budget_of(request: GenerateRequest, granted: Collection[str], *, reasons: bool) -> int | None:
    """Most tokens of reasoning in an answer; None where nothing limits them.

    granted: names of wishes that the template has variables for. reasons: whether the model writes
    its reasoning apart. Raises InputError, which begins with the field's name.
    """
    reasoning = request.reasoning
    enabled = _enabled(request)
    if enabled and not reasons:
        raise InputError("reasoning.enabled: this model does not reason before it answers")
    limits: list[int | None] = []
    if reasoning.HasField("most_tokens"):
        limits.append(reasoning.most_tokens)
    if enabled is False:
        limits.append(0)
    if reasoning.effort and "effort" not in granted and enabled is not False:
        if not reasons:
            raise InputError("reasoning.effort: this model does not reason before it answers")
        if reasoning.effort not in EFFORTS:
            known = ", ".join(EFFORTS)
            raise InputError(
                f"reasoning.effort: must be one of {known}, got {shown(reasoning.effort)}"
            )
        limits.append(EFFORTS[reasoning.effort])
    return min((limit for limit in limits if limit is not None), default=None) if reasons else None


def _enabled(request: GenerateRequest) -> bool | None:
    reasoning = request.reasoning
    if reasoning.effort == "none":
        return False
    return reasoning.enabled if reasoning.HasField("enabled") else None
