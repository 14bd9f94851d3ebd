"""The README's transcript and programs, run."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.chat_server import chat_server
from tests.support.pages import ROOT, fenced, run_program
from unicluster.cli import COMMANDS
from unicluster.trust.store import Store

README = (ROOT / "README.md").read_text("utf-8")
COLUMNS = 100
# `make demo` took 27 s on two cores: eight processes, three of which import MLX.
DEMO_SECONDS = 240.0

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
RULE = re.compile(r"─+")
PROMPT = "\n> "


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return fenced(README, language)


def transcript() -> str:
    """The output of `make demo`, without the line that starts it."""
    shown = next(block for block in blocks("") if block.startswith("$ make demo\n"))
    return shown.removeprefix("$ make demo\n")


def shape(text: str) -> list[str]:
    """The lines, with all that differs from machine to machine masked.

    That is numbers, addresses, chips, the order of the three agents, their bottleneck, and
    whether tokens were guessed.
    """
    lines: list[str] = []
    chips: tuple[int, int] | None = None
    for line in text.strip().splitlines():
        if chips and re.match("north|east|south", line):
            line = f"{line[: chips[0]]}CHIP {line[chips[1] :]}"
        if header := re.match(r"machine +(chip +)?", line):
            chips = header.span(1) if header[1] else None
        line = RULE.sub("─", line)
        line = re.sub(r"[█▓▒░]{2,}", "BAR", line)
        line = re.sub(r"\b(north|east|south)\b", "NAME", line)
        line = re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", line)
        if re.search(r"tokens/s|\d [kMG]?B|NAME", line):
            line = re.sub(r"\d[\d.,]*(-\d+)?", "N", line)
            line = re.sub(r"N [kMGT]?B(/s)?", r"SIZE\1", line)
        line = re.sub(r"^(bottleneck) .*", r"\1 WHY", line)
        line = re.sub(r"(together) \S+ (ms)", r"\1 N \2", line)
        line = re.sub(r"; prompt processing[^;]*", "", line)
        line = re.sub(r", N of N drafted tokens accepted", "", line)  # where guessing pays
        lines.append(" ".join(line.split()))
    return lines


def demo(home: Path, questions: list[str]) -> str:
    """`unicluster demo` in a pseudo-terminal, with the questions typed at its prompt."""
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[3] &= ~termios.ECHO  # the line editor shows what is typed
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    environment = {"TERM": "dumb", "COLUMNS": str(COLUMNS), "LINES": "40"}
    process = subprocess.Popen(
        [sys.executable, "-m", "unicluster", "demo"],
        env={**os.environ, "UNICLUSTER_HOME": str(home), "PYTHONPATH": str(ROOT), **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        shown = ""
        for question in questions:
            shown = _read(ours, shown, lambda text: text.endswith(PROMPT))
            os.write(ours, f"{question}\r".encode())
            shown = _read(ours, shown, lambda text, q=question: f"{PROMPT}{q}\n" in text)
        shown = _read(ours, shown, lambda text: False)
        assert process.wait(DEMO_SECONDS) == 0, shown
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return shown


def _read(descriptor: int, shown: str, enough: Callable[[str], bool]) -> str:
    """Output until there is enough of it, or the program has ended."""
    deadline = time.monotonic() + DEMO_SECONDS
    while not enough(shown):
        left = deadline - time.monotonic()
        assert left > 0, shown
        if select.select([descriptor], [], [], left)[0]:
            try:
                data = os.read(descriptor, 65536)
            except OSError:  # how Linux says that the other side is closed
                data = b""
            if not data:
                break
            shown = ESCAPE.sub("", shown + data.decode()).replace("\r", "")
    return shown


def test_is_short() -> None:
    prose = [line for line in README.splitlines() if not line.startswith("|")]

    assert len(README.encode()) <= 10_000
    assert [line for line in prose if len(line) > COLUMNS] == []


def test_the_transcript_is_what_the_demo_shows(tmp_path: Path) -> None:
    """Slow: a whole cluster is started and asked four questions."""
    questions = re.findall(r"^> (.+)$", transcript(), re.M)
    assert questions[-1] == "/exit"

    shown = demo(tmp_path, questions)

    assert shape(shown) == shape(transcript())


def test_the_table_of_commands_is_complete() -> None:
    _, _, section = README.partition("## Commands")
    listed = re.findall(r"^\| `unicluster (\w+)", section.partition("\n## ")[0], re.M)

    assert sorted(set(listed)) == sorted(COMMANDS)


def test_the_model_in_python_answers() -> None:
    """Slow: three stages are loaded."""
    program = next(block for block in blocks("python") if "unicluster.load" in block)

    assert run_program(program, os.environ.copy()) == "3, 4, 5, 6, 7, 8, 9.\n"


def test_the_client_in_python_gets_an_answer(tmp_path: Path) -> None:
    program = next(block for block in blocks("python") if "import Client" in block)

    with chat_server(Store(tmp_path).create()) as server:
        env = {"UNICLUSTER_HOME": str(tmp_path), "UNICLUSTER_SERVER": server.address}
        assert re.search(r"\d\n$", run_program(program, {**os.environ, **env}))
