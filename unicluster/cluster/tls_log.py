"""Says in our log who was refused at a TLS port, and why.

gRPC refuses a client in its C core and tells Python nothing. It does tell stderr, with the
address, once its `handshaker` trace is on. So stderr is read here: gRPC's own lines are taken out,
a failed handshake becomes one line of our log, and all else passes through. Tracing costs nothing
after the handshake.

A process whose stderr its parent reads anyway needs only TRACE_ENV; its parent then feeds each
line to a HandshakeLog. Any other calls `tap_stderr`.
"""

import atexit
import contextlib
import faulthandler
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO
from urllib.parse import unquote

log = logging.getLogger(__name__)

TRACE_ENV = {"GRPC_TRACE": "handshaker", "GRPC_VERBOSITY": "info"}

# A refused machine tries again every second; once a minute is enough to know.
REPEAT_AFTER = 60.0

# Spaces vary: absl puts them in at random, lest anyone should parse what it prints.
_GRPC_LINE = re.compile(
    r"[IW]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w./-]+\.(cc|h):\d+\] "
    r"|WARNING: All log messages before absl::InitializeLog"
    r"|\s*=== Source Location Trace: ===\s*$"
    r"|\s*shutdown=(true|false) index="
)
_SOURCE_LINE = re.compile(r"\s*src/core/\S+\.(cc|h):\d+\s*$")
_FAILED = re.compile(r"CallNextHandshakerLocked: error=(?!OK)(.*)")
_ARGUMENTS = re.compile(r"args=\{.*endpoint_(?:peer|remote)_address=(?:ipv[46]:)?([^,}]+)")

_HUNG_UP = "it hung up: it belongs to another cluster, or to none, or `doctor` measures the way"
_REASONS = [
    ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "it shows no certificate"),
    ("certificate has expired", "its certificate has expired"),
    ("certificate is not yet valid", "its certificate is not valid yet: compare the clocks"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not of this cluster"),
    ("ALERT_UNKNOWN_CA", "it belongs to another cluster"),
    ("ALERT_CERTIFICATE", "it does not accept our certificate"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS"),
    ("HTTP_REQUEST", "it does not speak TLS"),
    # What a member of another cluster does when it sees our certificate.
    ("Socket closed", _HUNG_UP),
    ("reset by peer", _HUNG_UP),
]


class HandshakeLog:
    """Tells gRPC's lines from all others, and logs a warning for each client refused."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failure: str | None = None  # seen, but not yet the address, which follows
        self._was_source_line = False  # an empty line after one is gRPC's
        self._logged: dict[tuple[str, str], float] = {}

    def feed(self, line: str) -> str | None:
        """The line (without its end) if it is none of gRPC's, else None."""
        was_source_line, self._was_source_line = self._was_source_line, False
        if _SOURCE_LINE.match(line):
            self._was_source_line = True
            return None
        if not _GRPC_LINE.match(line):
            return None if was_source_line and not line.strip() else line
        if failed := _FAILED.search(line):
            self._failure = failed[1]
        arguments = _ARGUMENTS.search(line)
        if self._failure is not None and arguments:
            # Only outgoing connections have a server to reach.
            if "grpc.server_uri=" not in line:
                self._refused(unquote(arguments[1]), self._failure)
            self._failure = None
        return None

    def _refused(self, address: str, failure: str) -> None:
        reason = next((meaning for mark, meaning in _REASONS if mark in failure), None)
        if reason is None:
            if "andshake failed" not in failure:
                return  # our own end closed the connection
            reason = failure
        now = self._clock()
        self._logged = {k: t for k, t in self._logged.items() if now - t < REPEAT_AFTER}
        key = (address.rpartition(":")[0], reason)
        if key not in self._logged:
            self._logged[key] = now
            log.warning("refused %s: %s", address, reason)


def tap_stderr() -> None:
    """Begin to log refused clients of this process. Call it once, before grpc is imported.

    Python's own stderr, the log and faulthandler's last words keep going straight to where they
    went; only what libraries write to descriptor 2 takes the way through here.
    Does nothing when GRPC_TRACE is set: then someone wants to see gRPC's lines.
    """
    if "GRPC_TRACE" in os.environ:
        return
    if "grpc" in sys.modules:
        log.warning("refused clients won't be logged: grpc was imported before tap_stderr ran")
        return
    verbosity = os.environ.get("GRPC_VERBOSITY")
    os.environ.update(TRACE_ENV)
    import grpc  # noqa: F401 - reads the settings, which children must not inherit

    del os.environ["GRPC_TRACE"], os.environ["GRPC_VERBOSITY"]
    if verbosity is not None:
        os.environ["GRPC_VERBOSITY"] = verbosity

    sys.stderr.flush()
    stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    for handler in logging.getLogger().handlers:
        # Else our reader would write to the pipe that it reads, and wait for itself.
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            handler.setStream(stderr)
    sys.stderr = stderr
    faulthandler.enable(stderr)
    reader = threading.Thread(target=_pass_on, args=(source, stderr), name="stderr", daemon=True)
    reader.start()

    @atexit.register
    def restore() -> None:
        os.dup2(stderr.fileno(), 2)  # the pipe ends here, unless a child still holds it
        reader.join(1.0)


def _pass_on(source: int, stderr: TextIO) -> None:
    handshakes = HandshakeLog()
    with os.fdopen(source, errors="backslashreplace") as lines:
        for line in lines:
            text = handshakes.feed(line.removesuffix("\n"))
            # A terminal that is gone must not stop the reading: writers would block.
            with contextlib.suppress(OSError):
                if text is not None:
                    stderr.write(text + "\n")
