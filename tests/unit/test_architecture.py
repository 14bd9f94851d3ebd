"""The floors of the house: who may import whom, and what runs without MLX."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deadlines import scaled

ROOT = Path(__file__).parents[2]
OURS = ("unicluster", "node", "coordinator")
BELOW = {"unicluster": set(), "node": {"unicluster"}, "coordinator": {"unicluster"}}

# Top floor first: a room may import those below it. "." is the package's own files.
FLOORS = {
    "coordinator": [
        *(
            "commands",
            "api",
            "openapi",
            "protocols",
            "terminal",
            "serving",
            "recovery",
            "state",
            "fleet",
            "models",
            "planning",
        ),
        *("planning.search", "."),
    ],
    "node": [
        *(
            "doctor",
            "agent",
            "power",
            "supervision",
            "inprocess",
            "inspect",
            "worker",
            "generation",
        ),
        *(
            "answers",
            "constraints",
            "tools",
            "prompts",
            "engines",
            "ggml",
            "ggml.cutting",
            "ggml.memory",
            "pipeline",
            "speculation",
            "mlx",
            "mlx.saved",
            "ring",
            "prefixes",
            "metering",
            "weights",
            ".",
        ),
    ],
    "unicluster": [
        *(
            "chat",
            "benchmark",
            "client",
            "telemetry",
            "checkpoints",
            "access",
            "dialing",
            "cluster",
        ),
        *("trust", "terminal", "system", ".", "v1"),
    ],
}
# These stand above all packages: the command, what names the public API, and the public `load`.
ABOVE = {"unicluster.__init__", "unicluster.__main__", "unicluster.cli", "unicluster.api"}
# The programs of `node` that the coordinator runs as processes of their own.
PROGRAMS = {
    ("coordinator.programs", "node.inspect.__main__"),
    ("coordinator.programs", "node.worker.baseline"),
}
DOTTED = re.compile(rf"({'|'.join(OURS)})(\.\w+)+")
MOST_MODULES = 16


def modules() -> dict[str, Path]:
    """Every module by its dotted name; that of a package ends in `.__init__`."""
    found = {}
    for package in OURS:
        for file in sorted((ROOT / package).rglob("*.py")):
            found[".".join(file.relative_to(ROOT).with_suffix("").parts)] = file
    return found


MODULES = modules()


def resolved(name: str) -> str | None:
    """The module that a dotted name is, or is in; None where it is not one of ours."""
    for known in (name, f"{name}.__init__"):
        if known in MODULES:
            return known
    parent = name.rpartition(".")[0]
    return parent if parent in MODULES else None


def names_in(file: Path) -> Iterator[str]:
    """Modules that a file imports, at whatever depth, and those that its strings name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if resolved(submodule) else node.module
        elif isinstance(node, ast.Constant) and DOTTED.fullmatch(str(node.value)):
            main = f"{node.value}.__main__"
            yield main if main in MODULES else str(node.value)


def arrows() -> dict[str, set[str]]:
    found = {}
    for module, file in MODULES.items():
        known = {resolved(name) for name in names_in(file)}
        found[module] = {other for other in known if other is not None and other != module}
    return found


ARROWS = arrows()


def room(module: str) -> tuple[str, str]:
    """The package and the room of a module."""
    package, *inside = module.split(".")
    return package, ".".join(inside[:-1]) or "."


def floor(module: str) -> int:
    package, name = room(module)
    return FLOORS[package].index(name)


def test_every_folder_is_a_room() -> None:
    assert {room(module) for module in MODULES} == {
        (package, name) for package, names in FLOORS.items() for name in names
    }


@pytest.mark.parametrize("package", OURS)
def test_no_arrow_points_up(package: str) -> None:
    upward = [
        f"{module} -> {other}"
        for module, others in ARROWS.items()
        if room(module)[0] == package and module not in ABOVE
        for other in others
        if (module, other) not in PROGRAMS
        if other in ABOVE - {"unicluster.__init__"}
        or (
            floor(other) < floor(module)
            if room(other)[0] == package
            else room(other)[0] not in BELOW[package]
        )
    ]
    assert upward == []


def test_there_is_no_circle() -> None:
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(ARROWS[module] - ABOVE):
                walk(other, (*path, module))
            done.add(module)

    for module in sorted(set(MODULES) - ABOVE):
        walk(module, ())


def test_rooms_are_small_enough_to_hold_in_mind() -> None:
    counts: dict[tuple[str, str], int] = {}
    for module in MODULES:
        if not module.endswith("__init__") and ".v1." not in module:
            counts[room(module)] = counts.get(room(module), 0) + 1
    assert {name: count for name, count in counts.items() if count > MOST_MODULES} == {}


@pytest.mark.parametrize("package", ["unicluster", "coordinator"])
def test_mlx_is_imported_only_by_nodes(package: str) -> None:
    for module, file in MODULES.items():
        if room(module)[0] == package:
            assert not {name.split(".")[0] for name in names_in(file)} & {"mlx", "mlx_lm"}, module


@pytest.mark.parametrize(
    "module",
    [
        *("unicluster.client.client", "unicluster.chat.command", "node.agent.join"),
        *("coordinator.commands.serve", "coordinator.commands.nodes"),
        *("coordinator.commands.status", "coordinator.serving.metrics_port"),
    ],
)
def test_agent_client_and_coordinator_run_without_mlx(module: str) -> None:
    program = f"import sys\nsys.modules['mlx'] = sys.modules['mlx_lm'] = None\nimport {module}\n"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=scaled(60))
