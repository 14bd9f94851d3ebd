"""Sleep as a Mac's IOKit announces it, and `caffeinate`, which keeps the Mac from falling asleep.

After Apple's Technical Q&A QA1340 and IOKit's headers. No Mac was at hand: it never ran on one.
"""

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable

# Between two looks at whether the machine is to be kept awake, in seconds.
LOOK_SECONDS = 1.0

# <IOKit/IOMessage.h>
CAN_SLEEP = 0xE0000270
WILL_SLEEP = 0xE0000280
WILL_NOT_SLEEP = 0xE0000290
HAS_POWERED_ON = 0xE0000300

_FRAMEWORKS = "/System/Library/Frameworks"
_Interested = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p
)


def follow(
    tell: Callable[[bool], None], keeps_awake: Callable[[], bool], stop: threading.Event
) -> None:
    """Blocks until `stop`. Raises OSError where IOKit gives no notifications."""
    power = _SystemPower(tell)
    awake = Caffeinate()
    try:
        while not stop.is_set():
            awake.hold(keeps_awake())
            power.wait(LOOK_SECONDS)
    finally:
        awake.hold(False)
        power.close()


class _SystemPower:
    """Notifications of the system's power, in the run loop of the thread that makes this."""

    def __init__(self, tell: Callable[[bool], None]) -> None:
        self._iokit = _iokit()
        self._foundation = _foundation()
        self._callback = _Interested(self._changes)  # must live as long as it may be called
        self._tell = tell
        self._port = ctypes.c_void_p()
        self._notifier = ctypes.c_uint32()
        self._root = self._iokit.IORegisterForSystemPower(
            None, ctypes.byref(self._port), self._callback, ctypes.byref(self._notifier)
        )
        if not self._root:
            raise OSError("IORegisterForSystemPower failed")
        self._mode = ctypes.c_void_p.in_dll(self._foundation, "kCFRunLoopDefaultMode")
        source = self._iokit.IONotificationPortGetRunLoopSource(self._port)
        self._foundation.CFRunLoopAddSource(
            self._foundation.CFRunLoopGetCurrent(), source, self._mode
        )

    def wait(self, seconds: float) -> None:
        """Handles what comes within some seconds."""
        self._foundation.CFRunLoopRunInMode(self._mode, seconds, False)

    def close(self) -> None:
        self._iokit.IODeregisterForSystemPower(ctypes.byref(self._notifier))
        self._iokit.IOServiceClose(self._root)
        self._iokit.IONotificationPortDestroy(self._port)

    def _changes(self, refcon: object, service: int, message: int, argument: int | None) -> None:
        try:
            if message == WILL_SLEEP:
                self._tell(True)
            elif message in (HAS_POWERED_ON, WILL_NOT_SLEEP):
                self._tell(False)
        finally:
            # Else the Mac waits for 30 s.
            if message in (CAN_SLEEP, WILL_SLEEP):
                self._iokit.IOAllowPowerChange(self._root, argument or 0)


class Caffeinate:
    """The program that keeps a Mac from falling asleep by itself, for as long as it is held."""

    def __init__(self, command: str = "/usr/bin/caffeinate") -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def hold(self, held: bool) -> None:
        """Starts or ends it, unless it is so already. It ends with this process, too."""
        if not held and self._process is not None:
            self._process.terminate()
            self._process.wait()  # it ends at the signal, in this thread of its own
            self._process = None
        if held and (self._process is None or self._process.poll() is not None):
            command = self._command, "-i", "-w", str(os.getpid())
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)


def _iokit() -> ctypes.CDLL:
    library = ctypes.CDLL(f"{_FRAMEWORKS}/IOKit.framework/IOKit")
    library.IORegisterForSystemPower.restype = ctypes.c_uint32
    library.IORegisterForSystemPower.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, _Interested, ctypes.c_void_p)
    ]
    library.IONotificationPortGetRunLoopSource.restype = ctypes.c_void_p
    library.IONotificationPortGetRunLoopSource.argtypes = [ctypes.c_void_p]
    library.IODeregisterForSystemPower.argtypes = [ctypes.c_void_p]
    library.IOServiceClose.argtypes = [ctypes.c_uint32]
    library.IONotificationPortDestroy.argtypes = [ctypes.c_void_p]
    library.IOAllowPowerChange.argtypes = [ctypes.c_uint32, ctypes.c_ssize_t]
    return library


def _foundation() -> ctypes.CDLL:
    library = ctypes.CDLL(f"{_FRAMEWORKS}/CoreFoundation.framework/CoreFoundation")
    library.CFRunLoopGetCurrent.restype = ctypes.c_void_p
    library.CFRunLoopAddSource.argtypes = [ctypes.c_void_p] * 3
    library.CFRunLoopRunInMode.restype = ctypes.c_int32
    library.CFRunLoopRunInMode.argtypes = [ctypes.c_void_p, ctypes.c_double, ctypes.c_bool]
    return library
