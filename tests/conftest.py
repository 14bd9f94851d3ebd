"""For all tests: the options, the order, and a time limit for each."""

import os
import signal
import threading
from collections.abc import Iterator
from importlib.metadata import version

import pytest

from tests.support import leftovers
from tests.support.cluster import ROOT
from tests.support.deadlines import scaled

# Stages share this machine, and llama.cpp's threads wait for one another without sleeping.
os.environ.setdefault("UNICLUSTER_GGML_THREADS", "1")

# Processes that tests start import transformers in half the time: tests/support/startup.
IMPORTS = ROOT / "build" / "tests" / f"transformers-{version('transformers')}"
IMPORTS.mkdir(parents=True, exist_ok=True)
os.environ["UNICLUSTER_TESTS_IMPORTS"] = str(IMPORTS)
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "tests" / "support" / "startup"), str(ROOT), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)

leftovers.watch()

# A test may take this many seconds on an idle machine, its fixtures included; most take one.
LIMIT_S = 200.0
# The first chapter of the fleet's story installs three hosts.
FLEET_LIMIT_S = 1500.0
# Beside other workers the rooms with the longest files go first, so that none is left at the end.
LONGEST_FIRST = ("cluster", "process", "unit")


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


# A run that is told to end ends what its tests have started, as after Ctrl-C.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, _interrupted)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Commands that run in this process change its environment: for one test alone."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({n: v for n, v in before.items() if n != "PYTEST_CURRENT_TEST"})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sweep",
        action="store_true",
        help="run whole sweeps too, of which representatives run without it",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--sweep"):
        left_out = [item for item in items if item.get_closest_marker("sweep")]
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]
        config.hook.pytest_deselected(items=left_out)
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=_room)  # stable: within a room the order stays
    for item in items:
        if item.get_closest_marker("timeout") is None:
            in_fleet = item.path.parent.name == "fleet"
            limit = FLEET_LIMIT_S if in_fleet else scaled(LIMIT_S)
            item.add_marker(pytest.mark.timeout(limit))


def _room(item: pytest.Item) -> int:
    """The place of an item's room in LONGEST_FIRST."""
    room = item.path.parent.name
    return LONGEST_FIRST.index(room) if room in LONGEST_FIRST else len(LONGEST_FIRST)
