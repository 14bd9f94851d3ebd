"""Events of a worker as its starter reads them: each a line of JSON, checked here."""

import json
from typing import Any

# The fields that an event of a kind must have, and their types. Numbers are 0 or more.
_FIELDS: dict[str, dict[str, type]] = {
    "fetching": {"fetched": int, "to_fetch": int},
    "progress": {"layers": int, "layers_total": int, "bytes": int, "bytes_total": int},
    "ready": {"port": int, "weight_bytes": int},
    "tokens": {"more": int},
    "failed": {"reason": str},
    "log": {"level": str, "logger": str, "message": str},
}


def parse_event(line: bytes) -> dict[str, Any]:
    """The event that a line of a worker's channel holds, its kind in "event".

    Raises ValueError, in a few words, when the line is not an event, or lacks what its kind needs.
    """
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError("not an event")
    for name, kind in _FIELDS.get(event["event"], {}).items():
        value = event.get(name)
        # A bool is an int to Python, and a message has no room for a number below 0.
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 1 << 63):
            raise ValueError(f"{event['event']} without a valid {name}")
    return event


def is_known(event: dict[str, Any]) -> bool:
    """Whether the kind of an event is one that a worker of this version sends."""
    return event["event"] in _FIELDS
