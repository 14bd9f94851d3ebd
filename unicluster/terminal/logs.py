"""The log of a command, on standard error, which nobody may read."""

import atexit
import logging
import queue
import sys
import threading
from logging.handlers import QueueHandler

from unicluster.terminal.output import Output

FORMAT = "%(asctime)s %(levelname)s %(message)s"
# Records that wait while standard error takes none; those after them are counted only.
MOST_WAITING = 1000
# How long the end of a command waits for its last records to be written.
LAST_SECONDS = 1.0


class StderrLog(QueueHandler):
    """Hands records to a thread that writes them: a full pipe stops that thread, and no other."""

    def __init__(self, stream: Output) -> None:
        self._waiting: queue.Queue[logging.LogRecord] = queue.Queue(MOST_WAITING)
        super().__init__(self._waiting)
        self._stream = stream
        self._dropped = 0
        self.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queues a formatted record, or counts it where too many wait."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def drain(self, timeout: float = LAST_SECONDS) -> None:
        """Waits until all is written that was logged so far, or for `timeout` seconds."""
        with self._waiting.all_tasks_done:
            self._waiting.all_tasks_done.wait_for(
                lambda: not self._waiting.unfinished_tasks, timeout
            )

    def _write(self) -> None:
        while True:
            record = self._waiting.get()
            lost, self._dropped = self._dropped, 0
            more = f"({lost} more messages are lost: nobody read them)\n" if lost else ""
            self._stream.write(f"{record.getMessage()}\n{more}")
            self._waiting.task_done()


def log_to_stderr(level: int) -> None:
    """Logs records of `level` and above to standard error, unless somebody logs them already."""
    root = logging.getLogger()
    if root.handlers:
        return
    handler = StderrLog(Output(sys.stderr))
    root.addHandler(handler)
    root.setLevel(level)
    atexit.register(handler.drain)


def drain() -> None:
    """Waits a moment for what was logged, before something else goes to standard error."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, StderrLog):
            handler.drain()
