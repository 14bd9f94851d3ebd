"""JSON objects that others wrote, read without losing anything."""

import json
import math
from typing import Any, NoReturn

from unicluster.errors import InputError, in_one_line

# Real ones, JSON schemas included, are nested some ten deep.
MOST_DEPTH = 64


def parse_object(field: str, text: str) -> dict[str, Any]:
    """The object that `text` is; of empty text one without members.

    Raises InputError, which begins with `field`, for other text: also for names that occur twice,
    numbers that are none, halves of surrogate pairs, and more than MOST_DEPTH levels.
    """
    try:
        parsed = json.loads(
            text or "{}",
            object_pairs_hook=_members,
            parse_constant=_no_number,
            parse_float=_finite,
        )
        if not isinstance(parsed, dict):
            raise ValueError("it is no object")
        if _deeper_than(MOST_DEPTH, parsed):
            raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep")
        json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError:
        reason = f"it is nested more than {MOST_DEPTH} levels deep"
    except ValueError as error:  # those of json and of Unicode included
        reason = in_one_line(error)
    else:
        return parsed
    raise InputError(f"{field} must be the JSON text of an object: {reason}")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice[:40]!r} twice")
    return members


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _deeper_than(most: int, value: Any) -> bool:
    level = [value]
    for _ in range(most):
        inner: list[Any] = []
        for each in level:
            inner += each.values() if isinstance(each, dict) else each
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return False
    return True
