"""Prints the events of a model that is being served, for `serve`, `demo` and `bench`."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from coordinator.planning.placement import Plan
from coordinator.serving.events import (
    Event,
    Events,
    Follower,
    HttpAddress,
    Inspected,
    Inspecting,
    Leaving,
    Listening,
    MachinesFound,
    Move,
    Moving,
    Planned,
    Progress,
    Recovered,
    Recovering,
    Retrying,
    Searching,
    StageAdopted,
    StageFailed,
    StageReady,
    Staying,
    Unloading,
)
from coordinator.terminal.loading import LoadingBars
from coordinator.terminal.plan import fleet_table, plan_table
from unicluster.terminal.output import Output
from unicluster.units import format_bytes


@contextlib.contextmanager
def printing(events: Events, *, stderr: bool = False) -> Iterator[Follower]:
    """While the block runs, events are printed to standard output, or to standard error.

    Whoever prints to the same stream must wait until the follower has caught up.
    """
    output = Output(sys.stderr if stderr else sys.stdout)
    printer = Printer(Console(file=cast(TextIO, output)))
    with events.followed(printer, "the printer") as follower:
        yield follower


class Printer:
    """Prints the fleet, the plan, the loading, failures and moves."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = contextlib.ExitStack()  # a spinner or the bars, while there are any
        self._bars: LoadingBars | None = None
        self._loading: set[str] = set()
        self._lost: float | None = None  # when the model stopped answering
        self._shown: set[str] = set()  # machines that were named

    def handle(self, event: Event) -> None:
        """Prints an event; some print nothing."""
        match event:
            case Searching():
                self._spin("Looking for machines")
            case MachinesFound():
                self.close()
                self._shown = {machine.name for machine in event.machines}
                self._console.print(fleet_table(event.machines))
            case Inspecting():
                self._spin(f"Inspecting {event.model}")
            case Inspected():
                self.close()
            case Planned():
                self.close()
                self._show_new(event.plan)
                self._console.print(plan_table(event.plan, event.variants, event.model))
                self._load(event.plan)
            case Progress() if self._bars is not None:
                self._bars.update(event.machine, event.progress)
            case StageAdopted() if self._bars is not None:
                self._bars.adopted(event.machine)
            case StageReady() if self._bars is not None:
                self._bars.ready(event.machine)
                self._loading.discard(event.machine)
                if not self._loading:
                    self.close()
            case StageFailed() if self._bars is not None:
                self._bars.failed(event.machine, event.reason)
                self.close()
            case Listening():
                self._say_where(event)
            case Recovering():
                self._lost = time.monotonic()
            case Recovered():
                self.close()
                seconds = time.monotonic() - self._lost if self._lost is not None else None
                self._lost = None
                self._console.print(recovered_line(event, seconds), soft_wrap=True)
            case Retrying():
                self.close()
                self._console.print(retrying_line(event), soft_wrap=True)
            case Moving():
                self._console.print(moving_line(event), soft_wrap=True)
            case Staying():
                self.close()
                self._console.print(staying_line(event), soft_wrap=True)
            case Leaving():
                self._console.print(Text(f"Ending: {leaving_line(event)}."))
            case Unloading():
                self._console.print("Unloading.")

    def close(self) -> None:
        """Ends the spinner, or leaves the bars as they are."""
        self._bars = None
        self._live.close()

    def _spin(self, text: str) -> None:
        self.close()
        self._live.enter_context(self._console.status(text))

    def _show_new(self, plan: Plan) -> None:
        """Names machines of a plan that came after the table of machines was printed."""
        for machine in (stage.machine for stage in plan.stages):
            if machine.name not in self._shown:
                self._shown.add(machine.name)
                self._console.print(
                    Text(machine.name, "bold").append(
                        f" has come: {format_bytes(machine.usable)} usable, {machine.address}",
                        "not bold",
                    ),
                    soft_wrap=True,
                )

    def _load(self, plan: Plan) -> None:
        self._bars = self._live.enter_context(LoadingBars(plan, self._console))
        self._loading = {stage.machine.name for stage in plan.stages}

    def _say_where(self, event: Listening) -> None:
        console = self._console
        console.print(f"\n[bold]{escape(event.model)}[/bold] is ready.")
        console.print("  unicluster chat            on any machine of the cluster")
        console.print(f"  gRPC {event.address}    with a certificate of the cluster")
        if event.http is not None:
            console.print(f"  {event.http.url}/v1    OpenAI's API, {_who_may(event.http)}")
        if event.metrics is not None:
            console.print(f"  {event.metrics}    with one of `unicluster token cert DIR`")
        console.print("[dim]Ctrl-C unloads the model and ends.[/dim]")


def _who_may(http: HttpAddress) -> str:
    if not http.is_private:
        return "with a key"
    if http.with_key:
        return "from this machine only, with a key; --http-cert FILE or --http-plain opens it"
    return "from this machine only, as there is no key (`unicluster key create`)"


def retrying_line(event: Retrying) -> Text:
    """`llama q4 does not answer yet: machine bob ended its stage. It is planned again.`"""
    line = Text(event.model, "bold").append(f" does not answer yet: {event.reason}", "not bold")
    return line.append(". It is planned again when machines change, or after a pause.", "not bold")


def moving_line(event: Moving) -> Text:
    """`llama q4 moves, for 23 % less time a token: layers 10-19 from bob to cat`."""
    less = f" moves, for {event.gain * 100:.0f} % less time a token"
    return Text(event.model, "bold").append(f"{less}: {_moves(event.moved)}.", "not bold")


def staying_line(event: Staying) -> Text:
    """`llama q4 stays where it is: machine cat ended its stage`."""
    return Text(event.model, "bold").append(f" stays where it is: {event.reason}", "not bold")


def leaving_line(event: Leaving) -> str:
    """`this machine goes down: the others keep their layers of llama for 120 s`."""
    return (
        f"{event.reason}: the others keep their layers of {event.model} for {event.seconds:.0f} s"
    )


def recovered_line(event: Recovered, seconds: float | None = None) -> Text:
    """`llama q4 is ready again after 12 s; moved: layers 10-19 from bob to cat`."""
    line = Text(event.model, "bold").append(" is ready again", "not bold")
    if seconds is not None:
        line.append(f" after {seconds:.0f} s" if seconds >= 1 else " within a second", "not bold")
    if not event.moved:
        return line.append(", on the same machines.", "not bold")
    return line.append(f"; moved: {_moves(event.moved)}.", "not bold")


def _moves(moved: tuple[Move, ...]) -> str:
    return ", ".join(map(_moved, moved))


def _moved(move: Move) -> str:
    count = move.end - move.first
    layers = f"layer {move.first}" if count == 1 else f"layers {move.first}-{move.end - 1}"
    return f"{layers} from {move.source} to {move.target}"
