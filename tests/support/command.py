"""`unicluster` commands in this process, where a process of their own is not the point."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from tests.support.cluster import Result
from unicluster.cli import main


def run_here(*words: str, home: Path | None = None) -> Result:
    """Runs a command to its end, 120 columns wide; `home` is its UNICLUSTER_HOME."""
    out, err = io.StringIO(), io.StringIO()
    changed = {"COLUMNS": "120"} | ({"UNICLUSTER_HOME": str(home)} if home else {})
    with environment(changed), redirect_stdout(out), redirect_stderr(err):
        try:
            main(words)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        else:
            raise AssertionError("a command always exits")
    return Result(code, out.getvalue(), err.getvalue())


@contextmanager
def environment(changed: dict[str, str]) -> Iterator[None]:
    """The environment with some variables changed, and afterwards as before."""
    before = dict(os.environ)
    os.environ.update(changed)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
