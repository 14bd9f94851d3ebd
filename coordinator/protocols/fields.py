"""Fields of a JSON request: read by name and type, bounded, and none of them ignored."""

import json
import math
from collections.abc import Iterable
from typing import Any

from unicluster.errors import InputError, shown

_NAMES = {str: "text", bool: "true or false", dict: "an object", list: "a list"}


class Fields:
    """The fields of one JSON object. Each is read once; `done` refuses those that were not.

    `where` is the path of the object in the request, for messages: "messages[2]". A field that
    is null is one that is absent. All readers raise InputError that begins with the field's path.
    """

    def __init__(self, values: Any, where: str = "") -> None:
        if not isinstance(values, dict):
            raise InputError(f"{where or 'the body'}: must be an object, got {_kind(values)}")
        self._where = where
        self._all = values
        self._values = {name: value for name, value in values.items() if value is not None}

    def path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def __contains__(self, name: str) -> bool:
        return name in self._values

    @property
    def values(self) -> dict[str, Any]:
        """The whole object as it came, for what looks into it besides."""
        return self._all

    def names(self) -> list[str]:
        """Fields that nobody has read so far."""
        return list(self._values)

    def take(self, name: str) -> Any:
        """The value as it is; None where it is absent."""
        return self._values.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self._typed(name, str)
        return None if value is None else clean(value, self.path(name))

    def needed_text(self, name: str) -> str:
        if (value := self.text(name)) is None:
            raise InputError(f"{self.path(name)}: missing")
        return value

    def flag(self, name: str) -> bool:
        """False where it is absent."""
        return bool(self._typed(name, bool))

    def items(self, name: str) -> list[Any] | None:
        value: list[Any] | None = self._typed(name, list)
        return value

    def object(self, name: str) -> "Fields | None":
        value = self._typed(name, dict)
        return None if value is None else Fields(value, self.path(name))

    def as_json(self) -> str:
        """The whole object as JSON text, for what is checked elsewhere: it counts as read."""
        self._values = {}
        try:
            return clean(json.dumps(self._all, ensure_ascii=False), self._where)
        except RecursionError:
            raise InputError(f"{self._where}: nested too deeply") from None

    def number(self, name: str) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        return number(value, self.path(name))

    def whole(self, name: str, low: int, high: int) -> int | None:
        """An integer from `low` to `high`; 3.0 is one, too."""
        value = self.take(name)
        if value is None:
            return None
        return whole(value, self.path(name), low, high)

    def choice(self, name: str, allowed: Iterable[Any]) -> Any:
        """A value that is one of `allowed`; any other is refused as not supported."""
        value = self.take(name)
        if value is None or any(_same(value, each) for each in allowed):
            return value
        raise InputError(f"{self.path(name)}: {brief(value)} is not supported here")

    def accept(self, *names: str) -> None:
        """Passes over fields of which the API's own documents say that they change no answer."""
        for name in names:
            self._values.pop(name, None)

    def refuse(self, reasons: dict[str, str]) -> None:
        """Raises InputError with the reason if one of these fields asks for anything.

        An object does even where it is empty: it asks for what its fields have by default.
        """
        for name, reason in reasons.items():
            value = self._values.pop(name, None)
            if value or isinstance(value, dict):
                raise InputError(f"{self.path(name)}: not supported here: {reason}")

    def done(self) -> None:
        """Raises InputError for a field that nobody has read."""
        for name in self._values:
            raise InputError(f"{_printable(self.path(name))}: no such field is known here")

    def _typed(self, name: str, kind: type) -> Any:
        value = self.take(name)
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{self.path(name)}: must be {_NAMES[kind]}, got {_kind(value)}")
        return value


def _same(value: Any, other: Any) -> bool:
    """Equality as JSON has it: 1 is not true."""
    return type(value) is type(other) and bool(value == other)


def clean(text: str, path: str) -> str:
    """The text. Raises InputError for half a surrogate pair, which UTF-8 can't express."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: not valid Unicode: half of a surrogate pair") from None
    return text


def number(value: Any, path: str) -> float:
    """A finite number. Raises InputError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{path}: must be a number, got {_kind(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise InputError(f"{path}: too large a number")
    return result


def whole(value: Any, path: str, low: int, high: int) -> int:
    """An integer from `low` to `high`. Raises InputError for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{path}: must be a whole number, got {_kind(value)}")
    if not low <= value <= high:
        raise InputError(f"{path}: must be from {low} to {high}, got {brief(value)}")
    return value


def brief(value: Any) -> str:
    """A JSON value for a message, short and without control characters."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 1 << 70:
        return "a huge number"
    text = repr(value) if not isinstance(value, dict | list) else _kind(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "text"
        case int() | float():
            return "a number"
        case list():
            return "a list"
    return "an object"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:80])
