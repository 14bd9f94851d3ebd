"""Telling systemd how a service is: sd_notify(3), without a library for one datagram."""

import os
import socket


def notify(state: str) -> None:
    """Sends `READY=1`, `STOPPING=1`, `STATUS=...`; does nothing outside a Type=notify service."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address)
        sender.sendall(state.encode())
