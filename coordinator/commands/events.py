"""`unicluster events`: what has happened to the models that were served from this machine."""

import contextlib
import datetime
import json
from collections.abc import Iterable
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from coordinator.state.database import Database
from coordinator.state.event_log import MOST_EVENTS, EventLog, Logged
from coordinator.terminal.tables import add_names, add_words, new_table, whole
from unicluster.command_line import Command, Option
from unicluster.errors import InputError
from unicluster.terminal.console import Console


def run(last: int, as_json: bool) -> int:
    if not 1 <= last <= MOST_EVENTS:
        raise InputError(f"--last {last}: between 1 and {MOST_EVENTS}")
    with contextlib.closing(Database()) as database:
        events = EventLog(database).newest(last)
    if as_json:
        for event in events:
            print(json.dumps(asdict(event)))
    elif events:
        Console().print(_table(events))
    else:
        print("Nothing has happened yet: nothing was served from this machine.")
    return 0


def _table(events: Iterable[Logged]) -> Table:
    table = new_table("Events")
    add_names(table, "time", "model")
    add_words(table, "what", "machine", "cause")
    table.add_column("")
    for event in events:
        at = datetime.datetime.fromtimestamp(event.at_s)
        table.add_row(
            whole(f"{at:%Y-%m-%d %H:%M:%S}"),
            whole(event.service),
            *(Text(word) for word in (event.kind, event.machine, event.cause, event.text)),
        )
    return table


command = Command(
    run,
    sections={
        "Events": [
            Option("--last", "how many, the newest (default: 50)", type=int, default=50),
            Option("--json", "one JSON object a line", name="as_json", is_flag=True),
        ],
    },
    examples=["unicluster events", "unicluster events --last 500 --json"],
)
