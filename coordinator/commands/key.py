"""`unicluster key create|list|revoke`: who may use the HTTP doors."""

import re
import sys
import time
from datetime import UTC, datetime

from coordinator.state.database import Database
from coordinator.state.keys import Key, Keys, Limits
from unicluster.command_line import Argument, Command, CommandGroup, Option
from unicluster.errors import InputError, shown

HEADINGS = ["name", "id", "state", "made", "expires", "requests", "tokens/min", "models"]
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "y": 365 * 86400}


def create(
    name: str, requests: int | None, tokens: int | None, models: str | None, expires: str | None
) -> int:
    for flag, value in (("--requests", requests), ("--tokens-per-minute", tokens)):
        if value is not None and not 1 <= value < 1 << 31:
            raise InputError(f"{flag} {value}: at least 1")
    names = None if models is None else tuple(each.strip() for each in models.split(","))
    if names is not None and not all(names):
        raise InputError(f"--models {models}: names no model; write it like demo,llama")
    expires_s = None if expires is None else time.time() + duration(expires)
    _, secret = Keys(Database()).create(name, Limits(requests, tokens, names, expires_s))
    print(secret)
    print(
        "It is shown this once. Clients send it as their API key; `serve` on this machine knows "
        "it at once.",
        file=sys.stderr,
    )
    return 0


def show() -> int:
    keys, now_s = Keys(Database()).all(), time.time()
    if not keys:
        print("There are no keys: the HTTP door answers this machine only.")
        return 0
    # Not a rich table: a terminal's width must not cut off a name or an id.
    rows = [HEADINGS, *(_cells(key, now_s) for key in keys)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0


def revoke(name: str) -> int:
    key = Keys(Database()).revoke(name)
    print(f"{key.name} ({key.id}) is revoked, for the next request on.")
    return 0


def duration(text: str) -> float:
    """Seconds of "12h", "30d" or "1y". Raises InputError for anything else."""
    match = re.fullmatch(r"([0-9]{1,6})([mhdy])", text.strip().lower())
    if match is None or not int(match[1]):
        raise InputError(f"--expires {shown(text)}: write it like 12h, 30d or 1y")
    return int(match[1]) * _SECONDS[match[2]]


def _cells(key: Key, now_s: float) -> list[str]:
    limits = key.limits
    return [
        *(key.name, key.id, key.state(now_s), _date(key.created_s), _date(limits.expires_s)),
        *(_or_dash(limits.most_running), _or_dash(limits.tokens_per_minute)),
        ", ".join(limits.models) if limits.models is not None else "all",
    ]


def _date(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


command = CommandGroup(
    [
        Command(
            create,
            name="create",
            summary="Make a key and print it, once.",
            arguments=[Argument("name", "who or what it is for")],
            sections={
                "Limits": [
                    Option("--requests", "at the same time", type=int, metavar="N"),
                    Option(
                        "--tokens-per-minute",
                        "of prompts and answers together",
                        name="tokens",
                        type=int,
                        metavar="N",
                    ),
                    Option("--models", "only these", metavar="A,B"),
                    Option("--expires", "after so long: 12h, 30d, 1y", metavar="TIME"),
                ]
            },
        ),
        Command(show, name="list", summary="List the keys, without their secrets."),
        Command(
            revoke,
            name="revoke",
            summary="End a key.",
            arguments=[Argument("name", "its name or id")],
        ),
    ],
    examples=[
        "unicluster key create open-webui",
        "unicluster key create guest --expires 7d --requests 2",
    ],
)
