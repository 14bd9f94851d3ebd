"""The screens of a newcomer, as text: `python -m tests.support.screens` writes them anew.

Each is shown at 80 and at 120 columns, in a pipe, and in a terminal with NO_COLOR, where an escape
code is shown as ␛. Review what changed: `git diff tests/unit/screens`.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from coordinator.commands import plan as plan_command
from coordinator.fleet.fleet import Fleet
from coordinator.models.question import ask
from coordinator.planning.links import Network
from coordinator.planning.placement import Layout
from coordinator.planning.planner import plan
from coordinator.planning.shortfall import NoPlanError
from coordinator.planning.variants import ModelVariants
from coordinator.serving.events import Inspected, Listening, MachinesFound, Planned, StageReady
from coordinator.terminal.plan import nodes_table
from coordinator.terminal.printer import Printer
from coordinator.terminal.status import status_table
from coordinator.terminal.watch import watching
from tests.support.fleets import GB, a_machine
from unicluster import cli
from unicluster.chat.context import fullness
from unicluster.chat.repl import greeting, summary
from unicluster.chat.screen import Screen
from unicluster.client.answers import ChatInfo, Finish, ServedStage, Timings, Usage
from unicluster.client.metrics import Histogram, HopMetrics, Metrics, StageMetrics
from unicluster.terminal.console import Console
from unicluster.v1 import node_pb2

FOLDER = Path(__file__).parents[1] / "unit" / "screens"
ESCAPE = "␛"


@dataclass(frozen=True)
class Way:
    """One way to look at a screen; columns: 0 in a pipe."""

    columns: int = 0
    no_color: bool = False

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HOME": "/home/ann",
            "TERM": "xterm" if self.no_color else "dumb",
            **({"COLUMNS": str(self.columns)} if self.columns else {}),
            **({"NO_COLOR": "1", "FORCE_COLOR": "1"} if self.no_color else {}),
        }


WAYS = {"80": Way(80), "120": Way(120), "pipe": Way(), "no-color": Way(80, no_color=True)}

STUDIOS = [
    a_machine(
        f"mac-studio-m3-ultra-512-{number}",
        412 * GB,
        819e9,
        chip="Apple M3 Ultra",
        address=f"192.168.1.2{number}:47600",
        backend="metal",
    )
    for number in (1, 2)
]
FRAMEWORK = a_machine(
    "framework-desktop-128",
    120 * GB,
    128e9,
    chip="AMD Ryzen AI Max+ 395",
    address="192.168.1.30:47600",
    backend="cpu",
    ggml_backend="vulkan",
    ggml_bandwidth=256e9,
)
LAYOUT = Layout(
    model_type="deepseek_v3",
    layer_bytes=(GB // 2,) * 3 + (11 * GB,) * 58,
    layer_active_bytes=(GB // 2,) * 3 + (GB // 2,) * 58,
    head_bytes=2 * GB,
    kv_bytes_per_layer=(GB // 100,) * 61,
    context=8192,
    users=1,
    hidden_bytes=14336,
    quant="q8",
    max_context=163840,
)
INFO = ChatInfo(
    model="deepseek-r1",
    quant="q8",
    context=8192,
    users=4,
    state="ready",
    detail="",
    stages=tuple(
        ServedStage(machine.name, first, first + 30, 330 * GB)
        for machine, first in zip(STUDIOS, (0, 30), strict=True)
    ),
    live_caches=0,
    lanes=2,
)
METRICS = Metrics(
    info=INFO,
    now_s=100.0,
    stages=tuple(StageMetrics(m.name, 10, 5.0, 1.0, 0.041) for m in STUDIOS),
    hops=tuple(
        HopMetrics(one.name, other.name, 10, 0.01, 3 * GB, 0.00042)
        for one, other in (STUDIOS, STUDIOS[::-1])
    ),
    time_to_first_token=Histogram((1.0, 2.0), (0, 4, 0), 6.0),
    between_tokens=Histogram((0.1, 0.2), (100, 0, 0), 8.0),
    ended={"stop": 3, "length": 0, "cancelled": 1, "failed": 0},
    generated_tokens=1000,
    prompt_tokens=500,
    reused_tokens=200,
    running=2,
    waiting=1,
    cached_bytes=GB,
    reserved_bytes=2 * GB,
    cache_bytes=8 * GB,
)
STORY = (
    "The lighthouse keeper counted the ships each evening, and each evening there was one more "
    "than the sea had given back. He wrote them down in a ledger with a blue cover:\n\n"
    "```\nevening  ships  the keeper's own remark, which is longer than the screen may be wide, "
    "and stays whole\n```\n\nOn the last page he drew a door.\n"
)


class Tty(io.StringIO):
    """A terminal whose width `os.get_terminal_size` is made to say."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


def _help(*words: str) -> Callable[[Way], None]:
    def show(way: Way) -> None:
        with contextlib.suppress(SystemExit):
            cli.main([*words])

    return show


def _plan(way: Way) -> None:
    machines = [*STUDIOS, FRAMEWORK]
    requested = ask("deepseek-r1", "q8", 0, 1)
    question = plan_command.Question(
        requested, ModelVariants(LAYOUT), Fleet(machines, Network()), lambda _: []
    )
    best = plan(LAYOUT, machines)
    line = plan_command.serve_line("deepseek-r1", best, question.variants, quant="q8")
    plan_command._show(question, best, None, line)


def _refused(way: Way) -> None:
    try:
        plan(LAYOUT, [FRAMEWORK], model="deepseek-r1 q8")
    except NoPlanError as error:
        _complaint(str(error), way)


def _complaint(message: str, way: Way) -> None:
    with contextlib.redirect_stderr(Tty() if way.columns else io.StringIO()) as shown:
        cli._complain(message, debug=False)
    print(shown.getvalue(), end="")


def _infos() -> list[tuple[node_pb2.NodeInfo, str]]:
    return [
        (
            node_pb2.NodeInfo(
                name=machine.name,
                chip=machine.chip,
                backend=next(iter(machine.engines.values())).backend,
                version="0.1.0",
                bandwidth=next(iter(machine.engines.values())).bandwidth,
                usable_memory=machine.usable,
                total_memory=machine.usable * 5 // 4,
                engines=["mlx"],
            ),
            machine.address,
        )
        for machine in (*STUDIOS, FRAMEWORK)
    ]


def _nodes(way: Way) -> None:
    Console().print(nodes_table(_infos()))


def _watched_nodes(way: Way) -> None:
    with watching(Console()) as show:
        for count in (1, 1, 3):
            show(nodes_table(_infos()[:count]))


def _status(way: Way) -> None:
    Console().print(status_table(METRICS, "192.168.1.21:47700"))


def _serve(way: Way) -> None:
    """In a pipe; in a terminal bars move."""
    machines = (*STUDIOS, FRAMEWORK)
    best = plan(LAYOUT, machines)
    printer = Printer(Console(force_terminal=False, width=way.columns or None))
    variants = ModelVariants(LAYOUT)
    printer.handle(MachinesFound(machines))
    printer.handle(Inspected("deepseek-r1 q8", variants))
    with mock.patch("time.monotonic", return_value=0.0):
        printer.handle(Planned("deepseek-r1 q8", variants, best))
        for stage in best.stages:
            printer.handle(StageReady(stage.machine.name))
    printer.close()
    printer.handle(Listening("deepseek-r1 q8", "192.168.1.21:47700", None))


def _chat(way: Way) -> None:
    out = Tty() if way.columns else io.StringIO()
    screen = Screen(out)
    screen.note(greeting(INFO))
    for asked, answer, used in (("Tell me a story.", STORY, 300), ("And then?", STORY, 6500)):
        out.write(f"> {asked}\n")
        for at in range(0, len(answer), 7):
            screen.text(answer[at : at + 7])
        screen.end_line()
        usage = Usage(prompt_tokens=used, completion_tokens=62)
        screen.note(summary(Finish("stop", usage, Timings(0.0, 0.42, 3.1, 20.0))))
        if full := fullness(used + 62, INFO.context):
            screen.note(f"{full}: /drop forgets the oldest turn, /reset all of them")
    screen.error("messages: the prompt has 8200 tokens and the context is 8192")
    print(out.getvalue(), end="")


SCREENS: dict[str, Callable[[Way], None]] = {
    "help": _help("--help"),
    "help-join": _help("join", "--help"),
    "help-plan": _help("plan", "--help"),
    "help-chat": _help("chat", "--help"),
    "hardware": _help("hardware"),
    "models": _help("models"),
    "plan": _plan,
    "plan-refused": _refused,
    "nodes": _nodes,
    "nodes-watched": _watched_nodes,
    "serve": _serve,
    "status": _status,
    "chat": _chat,
}


@contextlib.contextmanager
def _looked_at(way: Way) -> Iterator[None]:
    size = os.terminal_size((way.columns, 24))
    environment = mock.patch.dict(os.environ, way.environment, clear=True)
    with environment, mock.patch("os.get_terminal_size", return_value=size):
        yield


def screen(name: str, way: str) -> str:
    """One screen as it is shown, without the spaces at the ends of lines."""
    out = io.StringIO()
    silent = contextlib.redirect_stderr(io.StringIO())
    with _looked_at(WAYS[way]), silent, contextlib.redirect_stdout(out):
        SCREENS[name](WAYS[way])
    shown = out.getvalue().replace("\x1b", ESCAPE)
    return "\n".join(line.rstrip() for line in shown.splitlines()) + "\n"


def path_of(name: str, way: str) -> Path:
    return FOLDER / f"{name}.{way}.txt"


def write_all() -> None:
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for name in SCREENS:
        for way in WAYS:
            path_of(name, way).write_text(screen(name, way), "utf-8")


if __name__ == "__main__":
    write_all()
    sys.stderr.write(f"{len(SCREENS) * len(WAYS)} screens in {FOLDER}\n")
