"""Events of a served model: who follows them can't harm who publishes them."""

import io
import logging
import os
import threading
from dataclasses import dataclass, field

import pytest
from rich.console import Console

from coordinator.planning.planner import plan
from coordinator.planning.variants import ModelVariants
from coordinator.serving.events import (
    WAITING,
    Event,
    Events,
    Listening,
    MachinesFound,
    Move,
    Planned,
    Ready,
    Recovered,
    Unloading,
    moves,
)
from coordinator.terminal.printer import Printer
from tests.support.fleets import a_ring
from tests.support.screens import LAYOUT, STUDIOS
from unicluster.terminal.output import Output


@dataclass
class Recorder:
    """A handler that fails at each `Ready`, and waits for `gate` first."""

    gate: threading.Event = field(default_factory=threading.Event)
    handled: list[Event] = field(default_factory=list)
    closed: bool = False

    def handle(self, event: Event) -> None:
        assert self.gate.wait(10)
        if isinstance(event, Ready):
            raise ValueError("no")
        self.handled.append(event)

    def close(self) -> None:
        self.closed = True


async def test_who_follows_gets_all_events_in_order() -> None:
    recorder, events = Recorder(), Events()
    recorder.gate.set()
    sent = [Unloading(str(number)) for number in range(100)]

    with events.followed(recorder, "it") as follower:
        for event in sent:
            events.publish(event)
        assert await follower.caught_up()
        assert recorder.handled == sent

    assert recorder.closed


async def test_who_follows_slowly_or_fails_is_logged_once_and_blocks_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow, failing, events = Recorder(), Recorder(), Events()
    failing.gate.set()

    with events.followed(slow, "the slow one"), events.followed(failing, "the other") as other:
        for _ in range(3):
            events.publish(Ready("llama"))
        for _ in range(WAITING):
            events.publish(Unloading("llama"))
            assert await other.caught_up()
        slow.gate.set()

    assert len(failing.handled) == WAITING
    assert len(slow.handled) < WAITING
    messages = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted(messages) == [
        "the other failed at Ready",
        "the slow one failed at Ready",
        "the slow one is too slow: some events are dropped",
    ]


def test_moves_are_ranges_of_layers_that_changed_their_machine() -> None:
    before = a_ring(ann=4, bob=4, cid=4)
    after = a_ring(ann=5, cid=7)

    assert moves(before, after) == (Move(4, 5, "bob", "ann"), Move(5, 8, "bob", "cid"))
    assert moves(before, before) == ()


@pytest.mark.parametrize(
    ("moved", "line"),
    [
        ((), "llama [q4] is ready again, on the same machines.\n"),
        (
            (Move(4, 5, "bob", "ann"), Move(5, 8, "bob", "cid")),
            "llama [q4] is ready again; moved: layer 4 from bob to ann, "
            "layers 5-7 from bob to cid.\n",
        ),
    ],
)
def test_the_end_of_a_recovery_is_one_line(moved: tuple[Move, ...], line: str) -> None:
    out = io.StringIO()

    Printer(Console(file=out, width=40)).handle(Recovered("llama [q4]", moved))

    assert out.getvalue() == line


def test_a_stream_that_fails_takes_everything_and_says_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="ascii") as stream:
        output = Output(stream)
        printer = Printer(Console(file=output))  # type: ignore[arg-type]
        for _ in range(2):
            printer.handle(Listening("llama", "127.0.0.1:1", None))

        assert output.write("once more") == len("once more")
        assert not output.isatty()


def test_characters_that_the_stream_has_not_are_replaced() -> None:
    reading, writing = os.pipe()
    with open(writing, "w", encoding="ascii") as stream:
        Output(stream).write("5 µs")

    assert os.read(reading, 100) == b"5 ?s"
    os.close(reading)


def test_a_stream_that_is_not_there_takes_everything() -> None:
    assert Output(None).write("hello") == 5


def test_a_machine_that_came_after_the_table_is_named_once() -> None:
    out = io.StringIO()
    printer = Printer(Console(file=out, width=80))
    best, variants = plan(LAYOUT, STUDIOS), ModelVariants(LAYOUT)
    printer.handle(MachinesFound((STUDIOS[0],)))
    for _ in range(2):
        printer.handle(Planned("deepseek-r1 q8", variants, best))
        printer.close()

    assert out.getvalue().count(f"{STUDIOS[1].name} has come: 412.0 GB usable") == 1
    assert f"{STUDIOS[0].name} has come" not in out.getvalue()
