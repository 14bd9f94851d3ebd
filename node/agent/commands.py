"""Commands of the system that the agent asks things of."""

import subprocess
from collections.abc import Callable, Sequence

from unicluster.program import child_environment

# Runs a command and returns what it prints, or None when it is missing or fails.
Runner = Callable[[Sequence[str]], str | None]

SECONDS = 30.0


def run_command(command: Sequence[str]) -> str | None:
    """Runs a command; see Runner. One that takes longer than SECONDS counts as failed."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=child_environment()
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
