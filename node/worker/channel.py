"""The worker's end of its channel: events and log records, as lines of JSON on a pipe of their own.

Whatever a library prints goes to standard output or standard error, so it can't break an event.
`unicluster`'s other end of the pipe is `node.worker.process`.
"""

import json
import logging
import os
import threading
from typing import Any


class Channel:
    """Writes events to the inherited file descriptor `descriptor`. Safe to use from any thread."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)  # a program that the worker starts must not hold it
        self._descriptor = descriptor
        self._writing = threading.Lock()

    def send(self, event: str, **values: Any) -> None:
        """Writes one event, whole. Does nothing once the reader is gone."""
        line = memoryview(json.dumps({"event": event, **values}).encode() + b"\n")
        try:
            with self._writing:
                while line:
                    line = line[os.write(self._descriptor, line) :]
        except BrokenPipeError:
            pass  # whoever started this worker has ended, and standard input says so too


class ChannelHandler(logging.Handler):
    """Sends log records as events of kind "log", with level, logger and message apart."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)
        except Exception:
            self.handleError(record)
            return
        self._channel.send("log", level=record.levelname, logger=record.name, message=message)


_channel: Channel | None = None


def open_channel(descriptor: int) -> None:
    """Makes `descriptor` the channel of this process, and sends the log records there too."""
    global _channel  # a process has one, as it has one standard output
    _channel = Channel(descriptor)
    handlers = [ChannelHandler(_channel)]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers, force=True)


def emit(event: str, **values: Any) -> None:
    """Sends an event to whoever started this worker. Does nothing outside of a worker."""
    if _channel is not None:
        _channel.send(event, **values)
