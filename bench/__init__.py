"""Measurements, each a program: `python -m bench.NAME --help`."""

import signal
import threading

# A bench that is told to end ends the machines that it has started, as after Ctrl-C.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
