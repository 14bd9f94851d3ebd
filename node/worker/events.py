"""Events of a worker as its starter reads them: each a line of JSON, checked here."""

import json
from typing import Any

TEXT = 0
UINT32, UINT64 = 1 << 32, 1 << 64

# The fields that an event of a kind must have: text, or a number from 0 to below this one, which
# the message to the coordinator has room for.
_FIELDS: dict[str, dict[str, int]] = {
    "fetching": {"fetched": UINT64, "to_fetch": UINT64},
    "progress": {
        "layers": UINT32,
        "layers_total": UINT32,
        "bytes": UINT64,
        "bytes_total": UINT64,
    },
    "ready": {"port": UINT32, "weight_bytes": UINT64},
    "tokens": {"more": UINT64},
    "alive": {},
    "failed": {"reason": TEXT},
    "log": {"level": TEXT, "logger": TEXT, "message": TEXT},
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
    for name, limit in _FIELDS.get(event["event"], {}).items():
        if not _is_valid(event.get(name), limit):
            raise ValueError(f"{event['event']} without a valid {name}")
    return event


def is_known(event: dict[str, Any]) -> bool:
    """Whether the kind of an event is one that a worker of this version sends."""
    return event["event"] in _FIELDS


def _is_valid(value: object, limit: int) -> bool:
    if limit == TEXT:
        return isinstance(value, str)
    # A bool is an int to Python.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit
