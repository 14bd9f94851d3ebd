"""A D-Bus of its own with a logind that does as a test says: its far end is a real dbus-daemon."""

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jeepney import (
    DBusAddress,
    HeaderFields,
    Message,
    MessageType,
    message_bus,
    new_error,
    new_method_return,
    new_signal,
)
from jeepney.io.blocking import DBusConnection, Proxy, open_dbus_connection

from tests.support.cluster import until

DAEMON = shutil.which("dbus-daemon")
NAME = "org.freedesktop.login1"
_CONFIGURATION = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
    <allow eavesdrop="true"/>
  </policy>
</busconfig>
"""


class Bus:
    """A context manager: a system bus that only processes with `environment` use."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "bus"
        self._configuration = folder / "bus.conf"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={self._socket}"}

    def connect(self) -> DBusConnection:
        return open_dbus_connection(f"unix:path={self._socket}", enable_fds=True)

    def start(self) -> None:
        assert DAEMON is not None
        self._configuration.write_text(_CONFIGURATION.format(path=self._socket))
        command = (DAEMON, f"--config-file={self._configuration}", "--nofork", "--nopidfile")
        self._process = subprocess.Popen(command)
        until(self._answers, "the bus answers")

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
        self._socket.unlink(missing_ok=True)

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except OSError:
            return False
        return True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


class Lock:
    """A lock that somebody took. Its holder lets go of it by closing the other end."""

    def __init__(self, what: str, mode: str) -> None:
        self.what, self.mode = what, mode
        self._ours, self.theirs = socket.socketpair()

    @property
    def held(self) -> bool:
        self._ours.setblocking(False)
        try:
            return self._ours.recv(1) != b""
        except BlockingIOError:
            return True

    def given(self) -> None:
        self.theirs.close()


def prepare_for_sleep(asleep: bool, to: str = "") -> Message:
    """The signal, for all who follow it, or to one."""
    manager = DBusAddress("/org/freedesktop/login1", interface=f"{NAME}.Manager")
    signal = new_signal(manager, "PrepareForSleep", "b", (asleep,))
    if to:
        signal.header.fields[HeaderFields.destination] = to
    return signal


class Logind:
    """Grants locks, and announces sleep when a test says so."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._locks: list[Lock] = []
        self.follower = ""  # who took the newest of them
        self._connection = bus.connect()
        Proxy(message_bus, self._connection).RequestName(NAME)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def held(self, what: str, mode: str) -> list[Lock]:
        """The locks of that kind that are held now."""
        return [
            lock for lock in self._locks if (lock.what, lock.mode) == (what, mode) and lock.held
        ]

    def announce(self, asleep: bool) -> None:
        """Says that the machine falls asleep, or is awake."""
        self._connection.send(prepare_for_sleep(asleep))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)

    def _serve(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                message = self._connection.receive()
                if message.header.message_type is MessageType.method_call:
                    self._answer(message)

    def _answer(self, call: Any) -> None:
        if call.header.fields.get(HeaderFields.member) != "Inhibit":
            unknown = "org.freedesktop.DBus.Error.UnknownMethod"
            self._connection.send(new_error(call, unknown))
            return
        self.follower = call.header.fields[HeaderFields.sender]
        what, _, _, mode = call.body
        lock = Lock(what, mode)
        self._connection.send(new_method_return(call, "h", (lock.theirs.fileno(),)))
        lock.given()
        self._locks.append(lock)


@contextlib.contextmanager
def logind(folder: Path) -> Iterator[tuple[Bus, Logind]]:
    """A bus with a logind, while the block runs."""
    with Bus(folder) as bus:
        manager = Logind(bus)
        try:
            yield bus, manager
        finally:
            manager.close()
