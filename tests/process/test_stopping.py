"""Why a service ends, as systemd says over a real D-Bus."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jeepney import HeaderFields, MessageType, message_bus, new_error, new_method_return
from jeepney.io.blocking import Proxy

from tests.support.logind import DAEMON, Bus
from unicluster.system.stopping import why_it_comes_back

pytestmark = pytest.mark.skipif(DAEMON is None, reason="apt-get install dbus-daemon")

UNIT, JOB = "/org/freedesktop/systemd1/unit/it", "/org/freedesktop/systemd1/job/7"


class Systemd:
    """Says in which state the system is, and which job its one unit has; None: it knows no unit."""

    def __init__(self, bus: Bus) -> None:
        self.state, self.job = "running", ""
        self.knows_unit = True
        self._connection = bus.connect()
        Proxy(message_bus, self._connection).RequestName("org.freedesktop.systemd1")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # the bus has ended
            while True:
                call = self._connection.receive()
                if call.header.message_type is MessageType.method_call:
                    self._connection.send(self._answer(call))

    def _answer(self, call: Any) -> Any:
        if call.header.fields[HeaderFields.member] == "GetUnitByPID":
            if not self.knows_unit:
                return new_error(call, "org.freedesktop.systemd1.NoUnitForPID")
            assert call.body == (os.getpid(),)
            return new_method_return(call, "o", (UNIT,))
        known: dict[str, tuple[str, Any]] = {
            "SystemState": ("s", self.state),
            "Job": ("(uo)", (7, JOB) if self.job else (0, "/")),
            "JobType": ("s", self.job),
        }
        return new_method_return(call, "v", (known[call.body[1]],))


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    monkeypatch.setenv("INVOCATION_ID", "1")
    with Bus(tmp_path) as bus:
        for name, value in bus.environment.items():
            monkeypatch.setenv(name, value)
        yield Systemd(bus)


@pytest.mark.parametrize(
    ("state", "job", "why"),
    [
        ("running", "stop", ""),
        ("running", "", ""),
        ("degraded", "restart", "the service is restarted"),
        ("stopping", "stop", "this machine goes down"),
    ],
)
def test_why_a_service_ends(systemd: Systemd, state: str, job: str, why: str) -> None:
    systemd.state, systemd.job = state, job

    assert why_it_comes_back() == why


def test_who_is_no_unit_ends_for_good(systemd: Systemd) -> None:
    systemd.knows_unit = False

    assert why_it_comes_back() == ""


def test_outside_systemd_nobody_is_asked(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    systemd.state = "stopping"
    monkeypatch.delenv("INVOCATION_ID")

    assert why_it_comes_back() == ""


def test_without_a_bus_it_ends_for_good(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INVOCATION_ID", "1")
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus")

    assert why_it_comes_back() == ""
