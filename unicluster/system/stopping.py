"""Whether what ends this service brings it back soon: systemd knows, and is asked."""

import logging
import os

from jeepney import DBusAddress

from unicluster.system.bus import BusError, call, property_of, system_bus

log = logging.getLogger(__name__)

_SYSTEMD = "org.freedesktop.systemd1"
_MANAGER = DBusAddress(
    "/org/freedesktop/systemd1", bus_name=_SYSTEMD, interface=f"{_SYSTEMD}.Manager"
)


def why_it_comes_back() -> str:
    """Reason for which this service runs again soon, in a phrase; empty: none is known.

    Blocks for some seconds at most.
    """
    if "INVOCATION_ID" not in os.environ:  # systemd's mark of all that it starts
        return ""
    try:
        with system_bus() as bus:
            if property_of(bus, _MANAGER, "SystemState") == "stopping":
                return "this machine goes down"
            path = call(bus, _MANAGER, "GetUnitByPID", "u", (os.getpid(),))
            number, job = property_of(bus, _of(path, "Unit"), "Job")
            kind = property_of(bus, _of(job, "Job"), "JobType") if number else ""
    except BusError as error:
        log.info("why this service ends is not known: %s", error)
        return ""
    return "the service is restarted" if "restart" in kind else ""


def _of(path: str, interface: str) -> DBusAddress:
    return DBusAddress(path, bus_name=_SYSTEMD, interface=f"{_SYSTEMD}.{interface}")
