"""A program that is ended by a signal, after the last words in its environment."""

import os
import signal
import sys

if __name__ == "__main__":
    print(os.environ["LAST_WORDS"], file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
