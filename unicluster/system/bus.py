"""The D-Bus of the system, where there is one: how systemd and logind are asked."""

import contextlib
from collections.abc import Iterator
from typing import Any

from jeepney import (
    DBusAddress,
    DBusErrorResponse,
    Message,
    Properties,
    new_method_call,
)
from jeepney.io.blocking import DBusConnection, open_dbus_connection
from jeepney.wrappers import unwrap_msg

# For one answer of a service of the system.
CALL_SECONDS = 2.0


class BusError(Exception):
    """There is no bus, or who was called there answers not, or with an error."""


@contextlib.contextmanager
def system_bus() -> Iterator[DBusConnection]:
    """A connection while the block runs; all that fails in it raises BusError. For one thread."""
    try:
        with open_dbus_connection("SYSTEM", enable_fds=True) as connection:
            yield connection
    except FileNotFoundError:
        raise BusError("this system has no D-Bus") from None
    except (OSError, ValueError, RuntimeError, DBusErrorResponse) as error:
        raise BusError(f"the system's D-Bus: {error}") from error


def call(connection: DBusConnection, where: DBusAddress, method: str, *arguments: Any) -> Any:
    """First value of a method's answer. The first of `arguments` is their signature."""
    return _answer(connection, new_method_call(where, method, *arguments))


def property_of(connection: DBusConnection, where: DBusAddress, name: str) -> Any:
    """Value of a property, without its signature."""
    return _answer(connection, Properties(where).get(name))[1]


def _answer(connection: DBusConnection, message: Message) -> Any:
    return unwrap_msg(connection.send_and_get_reply(message, timeout=CALL_SECONDS))[0]
