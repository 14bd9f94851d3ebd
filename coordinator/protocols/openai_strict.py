"""Schemas that OpenAI's strict mode allows."""

from collections.abc import Iterator
from typing import Any

from unicluster.errors import InputError, shown

# Keywords whose values are schemas by name, lists of schemas, or a schema.
_NAMED = ("properties", "$defs", "definitions")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items",)

# A schema's place: the steps to it, the last one first.
_Steps = tuple[str, "_Steps"] | None


def check_strict(schema: Any, path: str) -> None:
    """Raises InputError, which begins with `path`, for a schema that strict mode does not allow.

    The answer is an object, and in each of its objects nothing else than the properties is
    allowed, and all of them are required: a value that may be missing is one that may be null.
    """
    if schema.get("type") != "object":
        raise InputError(f"{path}: strict, so its type must be object")
    waiting: list[tuple[Any, _Steps]] = [(schema, None)]
    while waiting:
        part, steps = waiting.pop()
        if not isinstance(part, dict):
            continue  # true, false, or no schema: the constraint itself refuses that
        if reason := _reason(part):
            raise InputError(f"{path}: strict, so in {_place(steps)} {reason}")
        waiting += [(inner, (step, steps)) for step, inner in _inner(part)]


def _reason(part: dict[str, Any]) -> str:
    """Why strict mode does not allow this one schema; empty where it does."""
    kind = part.get("type")
    named = part.get("properties")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind) and named is None:
        return ""
    if part.get("additionalProperties") is not False:
        return "additionalProperties must be false"
    required = part.get("required")
    listed = required if isinstance(required, list) else []
    there = {name for name in listed if isinstance(name, str)}
    missing = [name for name in named if name not in there] if isinstance(named, dict) else []
    return f"required must name {shown(missing[0])}, too" if missing else ""


def _inner(part: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword in _NAMED:
        if isinstance(named := part.get(keyword), dict):
            yield from ((f"{keyword}.{name}", inner) for name, inner in named.items())
    for keyword in (*_LISTED, *_SINGLE):
        listed = part.get(keyword)
        if isinstance(listed, list):
            yield from ((f"{keyword}[{at}]", inner) for at, inner in enumerate(listed))
        elif keyword in _SINGLE:
            yield keyword, listed


def _place(steps: _Steps) -> str:
    names = []
    while steps is not None:
        name, steps = steps
        names.append(name)
    return shown(".".join(reversed(names))) if names else "the schema itself"
