"""Python programs of the project as child processes, which import nothing from where they start.

A child of `python -m` or `python -c` would look for modules in its working directory first, and
that may be anybody's.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

# From here the project's modules can be imported, wherever this process was started.
ROOT = Path(__file__).parents[1]


def module_command(module: str, *arguments: str) -> list[str]:
    """Command that runs a module as a program."""
    return [sys.executable, "-P", "-m", module, *arguments]


def code_command(code: str) -> list[str]:
    """Command that runs a few lines of Python."""
    return [sys.executable, "-P", "-c", code]


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of this process, and `extra`, in which a child finds the project's modules."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    absolute = [path for path in paths if os.path.isabs(path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(absolute), **(extra or {})}
