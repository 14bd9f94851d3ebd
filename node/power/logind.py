"""Sleep as systemd-logind announces it on the system's D-Bus.

A "delay" lock has it wait until coordinators have heard of it; an "idle" lock keeps the machine
from falling asleep when nobody uses it.
"""

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

from jeepney import DBusAddress, HeaderFields, MatchRule, message_bus
from jeepney.io.blocking import DBusConnection, Proxy

from unicluster.system.bus import CALL_SECONDS, BusError, call, system_bus

log = logging.getLogger(__name__)

# Between two looks at whether the machine is to be kept awake.
LOOK_SECONDS = 1.0
# Until a bus that was lost, or isn't there, is looked for again.
RETRY_SECONDS = 30.0

_NAME = "org.freedesktop.login1"
_MANAGER = DBusAddress("/org/freedesktop/login1", bus_name=_NAME, interface=f"{_NAME}.Manager")
_SIGNAL = {"interface": f"{_NAME}.Manager", "member": "PrepareForSleep"}
# The daemon knows who has logind's name; a message has the number of its sender alone.
_SUBSCRIBED = MatchRule(type="signal", sender=_NAME, **_SIGNAL)
_RECEIVED = MatchRule(type="signal", **_SIGNAL)


def follow(
    tell: Callable[[bool], None],
    keeps_awake: Callable[[], bool],
    stop: threading.Event,
    retry_seconds: float = RETRY_SECONDS,
) -> None:
    """Blocks until `stop`. See `node.power.following.followed` for the others."""
    said = ""
    while not stop.is_set():
        try:
            with system_bus() as bus, contextlib.ExitStack() as stack:
                said = ""
                _follow(bus, stack, tell, keeps_awake, stop)
        except BusError as error:
            if str(error) != said:
                said = str(error)
                log.info("sleep is known afterwards only: %s", said)
            stop.wait(retry_seconds)


def _follow(
    bus: DBusConnection,
    stack: contextlib.ExitStack,
    tell: Callable[[bool], None],
    keeps_awake: Callable[[], bool],
    stop: threading.Event,
) -> None:
    delay, idle = _Lock(bus, "sleep", "delay"), _Lock(bus, "idle", "block")
    stack.callback(delay.release)
    stack.callback(idle.release)
    daemon = Proxy(message_bus, bus, timeout=CALL_SECONDS)
    signals = stack.enter_context(bus.filter(_RECEIVED, bufsize=16))
    daemon.AddMatch(_SUBSCRIBED)
    delay.take("tells the coordinator of its stages first")
    while not stop.is_set():
        if keeps_awake():
            idle.take("layers of a model are loaded here")
        else:
            idle.release()
        try:
            signal = bus.recv_until_filtered(signals, timeout=LOOK_SECONDS)
        except TimeoutError:
            continue
        if (signal.header.fields.get(HeaderFields.sender),) != daemon.GetNameOwner(_NAME):
            continue  # anybody may send us such a message
        asleep = bool(signal.body[0])
        try:
            tell(asleep)
        finally:
            delay.release()
        if not asleep:
            delay.take("tells the coordinator of its stages first")


class _Lock:
    """A lock of logind's, held for as long as its file is open."""

    def __init__(self, bus: DBusConnection, against: str, mode: str) -> None:
        self._bus = bus
        self._against = against
        self._mode = mode
        self._file: Any = None

    def take(self, why: str) -> None:
        """Takes it, unless it is held."""
        if self._file is None:
            words = self._against, "unicluster", why, self._mode
            self._file = call(self._bus, _MANAGER, "Inhibit", "ssss", words)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
