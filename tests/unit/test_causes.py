"""Losses are told apart, and logged within bounds."""

import errno
import json
import math
import signal
from pathlib import Path

import pytest

from coordinator.commands import events as command
from coordinator.serving.events import Events, Recovering, StageAdopted, StageFailed, WorkerEnded
from coordinator.serving.exposition import DeploymentCollector
from coordinator.state.database import NAME, Database
from coordinator.state.event_log import EventLog
from coordinator.terminal.event_log import EventLogger
from unicluster.causes import Cause, of_error, of_exit
from unicluster.client.metrics import metrics_from_wire
from unicluster.errors import InputError, UnavailableError
from unicluster.v1.chat_pb2 import Measured

ROOT = Path(__file__).parents[2]


def chained(cause: Exception) -> Exception:
    """An error of ours that was raised from another one, which its text does not name."""
    try:
        try:
            raise cause
        except Exception as error:
            raise UnavailableError("the file could not be fetched") from error
    except UnavailableError as error:
        return error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Cause.DISK_FULL),
        (chained(OSError(errno.ENOSPC, "x")), Cause.DISK_FULL),
        (chained(OSError(errno.EDQUOT, "x")), Cause.DISK_FULL),
        (RuntimeError("write: No space left on device"), Cause.DISK_FULL),
        (chained(MemoryError()), Cause.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: unspecified launch failure"), Cause.DRIVER_FAULT),
        (RuntimeError("vk::Queue::submit: ErrorDeviceLost"), Cause.DRIVER_FAULT),
        (RuntimeError("an oxide of iron"), None),
        (OSError(errno.ENOENT, "No such file"), None),
    ],
)
def test_the_cause_of_an_error(error: Exception, cause: Cause | None) -> None:
    assert of_error(error) == cause


def test_an_error_that_is_its_own_context_ends_the_search() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__context__, other.__context__ = other, one

    assert of_error(one) is None


@pytest.mark.parametrize(
    ("code", "lines", "out_of_memory", "cause"),
    [
        (-signal.SIGKILL, [], False, Cause.KILLED),
        (-signal.SIGKILL, [], True, Cause.OUT_OF_MEMORY),
        (-signal.SIGTERM, [], False, Cause.KILLED),
        (-signal.SIGSEGV, [], False, Cause.CRASHED),
        (-signal.SIGABRT, ["[METAL] Command buffer execution failed: ..."], False, "driver fault"),
        (1, ["ggml_vulkan: VK_ERROR_DEVICE_LOST"], False, Cause.DRIVER_FAULT),
        (1, ["OSError: [Errno 28] No space left on device"], False, Cause.DISK_FULL),
        (1, ["boom"], False, Cause.CRASHED),
    ],
)
def test_the_cause_of_an_exit(code: int, lines: list[str], out_of_memory: bool, cause: str) -> None:
    assert of_exit(code, lines, out_of_memory=out_of_memory) == cause


def test_losses_are_counted_by_cause_for_prometheus() -> None:
    events = Events()
    for event in (
        WorkerEnded("ann", "ended by signal 9 (SIGKILL)", "killed"),
        StageFailed("bob", "machine bob stopped answering", "unreachable"),
        StageFailed("bob", "machine bob stopped answering", "unreachable"),
        StageFailed("cid", "a word of a newer agent", "struck by lightning"),
    ):
        events.publish(event)
    metrics = metrics_from_wire(Measured(losses=events.losses))

    (family,) = (
        family
        for family in DeploymentCollector(lambda: metrics).collect()
        if family.name == "unicluster_losses"
    )
    counted = {sample.labels["cause"]: sample.value for sample in family.samples if sample.value}
    assert counted == {"killed": 1, "unreachable": 2, "failed": 1}


def test_the_newest_cause_is_known_for_as_long_as_one_asks_for() -> None:
    events = Events()
    assert events.cause_since(math.inf) == ""
    events.publish(WorkerEnded("ann", "ended by signal 9 (SIGKILL)", "killed"))
    events.publish(StageFailed("bob", "machine bob stopped answering", "unreachable"))

    assert events.cause_since(math.inf) == "unreachable"
    assert events.cause_since(-1.0) == ""


def test_what_is_published_of_a_model_names_every_cause() -> None:
    schema = json.loads((ROOT / "docs" / "mqtt.schema.json").read_text())

    assert schema["$defs"]["cause"]["enum"] == ["", *Cause]


def test_the_log_keeps_the_newest(tmp_path: Path) -> None:
    log = EventLog(Database(tmp_path / NAME), most=5)
    for number in range(12):
        log.add("llama", "ready", text=str(number))

    assert [event.text for event in log.newest(100)] == ["7", "8", "9", "10", "11"]
    assert [event.text for event in log.newest(2)] == ["10", "11"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNICLUSTER_HOME", str(tmp_path))
    return tmp_path


def test_what_happens_is_shown_by_the_command(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = EventLogger("llama")
    for event in (
        StageAdopted("ann"),
        WorkerEnded("ann", "killed by the system for lack of memory", "out of memory"),
        StageFailed("bob", "machine bob (10.0.0.2:47600) stopped answering", "unreachable"),
        Recovering("llama", "machine bob stopped answering"),
    ):
        logger.handle(event)
    logger.close()

    assert command.run(last=50, as_json=True) == 0

    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["kind"], each["machine"], each["cause"]) for each in shown] == [
        ("adopted", "ann", ""),
        ("worker ended", "ann", "out of memory"),
        ("stage lost", "bob", "unreachable"),
        ("recovering", "", ""),
    ]
    assert command.run(last=1, as_json=False) == 0
    assert "machine bob stopped answering" in " ".join(capsys.readouterr().out.split())


def test_nothing_to_show_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(last=50, as_json=False) == 0
    assert capsys.readouterr().out.startswith("Nothing has happened yet")


@pytest.mark.parametrize("last", [0, -1, 10_001])
def test_a_count_that_is_none_is_refused(home: Path, last: int) -> None:
    with pytest.raises(InputError, match=f"--last {last}: between 1 and 10000"):
        command.run(last=last, as_json=False)
