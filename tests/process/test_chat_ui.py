"""`unicluster chat`, in a real pseudo-terminal and in real pipes."""

import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat_server import ChatServer, chat_server, until
from tests.support.deadlines import scaled
from unicluster.client.client import Client
from unicluster.trust.store import Store

CHAT = [sys.executable, "-m", "unicluster", "chat"]
# Ctrl-C is a signal only in the terminal that controls the process.
CHAT_IN_TERMINAL = [
    sys.executable,
    "-c",
    "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "from unicluster.cli import main; main()",
    "chat",
]

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")
# prompt_toolkit asks for bracketed paste each time when it is ready to read a line.
ASKS_FOR_PASTE, READY = "\x1b[?2004h", "<ready>"
CTRL_C, CTRL_D, TAB, UP = "\x03", "\x04", "\t", "\x1b[A"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[ChatServer]:
    with chat_server(Store(home).create()) as running:
        yield running


@pytest.fixture
def environment(server: ChatServer, home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "UNICLUSTER_HOME": str(home),
        "UNICLUSTER_SERVER": server.address,
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody answers where the cursor is
    }


class Terminal:
    """A chat in a pseudo-terminal, and the person before it."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self.raw = ""
        self._descriptor = descriptor
        self._read = 0

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def say(self, line: str) -> None:
        """Wait for the prompt, then type a line."""
        self.expect(READY)
        self.type(f"{line}\r")

    def expect(self, text: str, seconds: float = 10.0) -> str:
        """Wait for `text`; returns what appeared before it, without escape codes."""
        deadline = time.monotonic() + scaled(seconds)
        while (found := self._seen().find(text, self._read)) < 0:
            left = deadline - time.monotonic()
            assert left > 0, f"no {text!r} in {self._seen()[self._read :]!r}"
            if select.select([self._descriptor], [], [], left)[0]:
                self.raw += self._read_some().decode()
        before = self._seen()[self._read : found]
        self._read = found + len(text)
        return before

    def _read_some(self) -> bytes:
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # how Linux says that the other side is closed
            data = b""
        assert data, f"the chat ended: {self._seen()[self._read :]!r}"
        return data

    def _seen(self) -> str:
        return ESCAPE.sub("", self.raw.replace(ASKS_FOR_PASTE, READY))


@contextmanager
def terminal(environment: dict[str, str], *arguments: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 200))
    process = subprocess.Popen(
        [*CHAT_IN_TERMINAL, *arguments],
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def pipe(
    environment: dict[str, str], *arguments: str, piped: str | bytes = ""
) -> subprocess.CompletedProcess[str]:
    """Run a chat whose input and output are pipes."""
    done = subprocess.run(
        [*CHAT, *arguments],
        env=environment,
        input=piped.encode() if isinstance(piped, str) else piped,
        capture_output=True,
        timeout=scaled(20),
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def live_answers(server: ChatServer) -> int:
    with Client(server.address, cluster=server.cluster) as client:
        return client.describe().live_caches


def last_request(chat: Terminal) -> dict[str, Any]:
    """Messages that the server got, all of the conversation included."""
    chat.say("request")
    chat.expect("{")
    request: dict[str, Any] = json.loads("{" + chat.expect("1 token,"))
    return request


def test_a_line_gets_a_streamed_answer_and_its_numbers(environment: dict[str, str]) -> None:
    with terminal(environment) as chat:
        chat.expect("parrot q4, 2 machines, context 4096, /help lists the commands")
        chat.say("hello there")
        chat.expect("You said: hello there\r\n")
        chat.expect("4 tokens, 41.3 tokens/s, TTFT 0.12 s")
        chat.expect(READY)
    assert "\x1b[2m4 tokens" in chat.raw


def test_the_conversation_goes_along_until_it_is_reset(environment: dict[str, str]) -> None:
    with terminal(environment, "--system", "Be brief.", "--temperature", "0.5") as chat:
        chat.say("hello")
        chat.expect("TTFT")
        assert last_request(chat) == {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "You said: hello"},
                {"role": "user", "content": "request"},
            ],
            "sampling": {"temperature": 0.5},
        }
        chat.say("/reset")
        chat.expect("the conversation is forgotten")
        chat.say("/system Talk like a parrot.")
        chat.expect("the system message is set")
        assert last_request(chat)["messages"] == [
            {"role": "system", "content": "Talk like a parrot."},
            {"role": "user", "content": "request"},
        ]


def test_ctrl_c_stops_the_answer_and_keeps_what_came(
    environment: dict[str, str], server: ChatServer
) -> None:
    with terminal(environment) as chat:
        chat.say("hold")
        chat.expect("Once upon a time")
        assert live_answers(server) == 1

        chat.type(CTRL_C)

        chat.expect("stopped")
        until(lambda: live_answers(server) == 0)
        assert last_request(chat)["messages"] == [
            {"role": "user", "content": "hold"},
            {"role": "assistant", "content": "Once upon a time"},
            {"role": "user", "content": "request"},
        ]


def test_ctrl_c_before_the_first_token_forgets_the_question(
    environment: dict[str, str], server: ChatServer
) -> None:
    with terminal(environment) as chat:
        chat.say("silence")
        until(lambda: live_answers(server) == 1)
        chat.type(CTRL_C)
        chat.expect("stopped")
        assert last_request(chat)["messages"] == [{"role": "user", "content": "request"}]


@pytest.mark.parametrize("leave", ["/exit\r", CTRL_D])
def test_exit_and_ctrl_d_leave(environment: dict[str, str], leave: str) -> None:
    with terminal(environment) as chat:
        chat.expect(READY)
        chat.type(leave)
        assert chat.process.wait(timeout=scaled(5)) == 0


def test_ctrl_c_at_the_prompt_clears_the_line_or_tells_how_to_leave(
    environment: dict[str, str],
) -> None:
    with terminal(environment) as chat:
        chat.expect(READY)
        chat.type("half a thought")
        chat.expect("half a thought")
        chat.type(CTRL_C)
        chat.expect(READY)
        chat.type(CTRL_C)
        assert "leaves" not in chat.expect("/exit or Ctrl-D leaves")
        chat.say("whole")
        chat.expect("You said: whole")


def test_a_failed_turn_is_one_line_and_not_kept(environment: dict[str, str]) -> None:
    with terminal(environment) as chat:
        chat.say("refuse RESOURCE_EXHAUSTED 8 answers wait already: try again later")
        chat.expect("error: 8 answers wait already: try again later")
        assert last_request(chat)["messages"] == [{"role": "user", "content": "request"}]


def test_an_unknown_command_is_named(environment: dict[str, str]) -> None:
    with terminal(environment) as chat:
        chat.say("/dance")
        chat.expect("error: there is no command /dance: /help lists them")
        chat.say("/help")
        chat.expect("/save FILE")
        chat.say(" /dance")
        chat.expect("You said: /dance")


def test_tab_completes_commands(environment: dict[str, str]) -> None:
    with terminal(environment) as chat:
        chat.expect(READY)
        chat.type(f"/sy{TAB}")
        chat.expect("/system")
        chat.type("Be kind.\r")
        chat.expect("the system message is set")
        assert last_request(chat)["messages"][0]["content"] == "Be kind."


def test_a_full_context_is_said_and_the_oldest_turns_are_dropped(
    environment: dict[str, str],
) -> None:
    with terminal(environment) as chat:
        for turn in ("one", "two", "three"):
            chat.say(f"hello {turn}")
            chat.expect("TTFT")
        chat.say("fill 3900")
        chat.expect("the context is 95 % full, 3905 of 4096 tokens: /drop forgets the oldest turn")
        chat.say("/drop")
        chat.expect("1 turn forgotten, 3 left")
        chat.say("/drop x")
        chat.expect("error: /drop x: how many turns, 1 or more")
        # The prompt is too long with more than one message before it.
        chat.say("crowd 2")
        chat.expect("the prompt has 5000 tokens and the context is 4096")
        chat.expect("oldest turns of 3 and ask again? [Y/n]")
        chat.type("\r")
        chat.expect("there is room again")
        messages = last_request(chat)["messages"]
        assert [m["content"] for m in messages[-3:-1]] == ["crowd 2", "there is room again"]

        chat.say("crowd 0")
        chat.expect("ask again? [Y/n]")
        chat.type("n\r")
        chat.expect("the message was not kept")


def test_pasted_lines_are_one_message(environment: dict[str, str]) -> None:
    with terminal(environment) as chat:
        chat.expect(READY)
        chat.type("\x1b[200~first\nsecond\x1b[201~\r")
        chat.expect("You said: first\r\nsecond\r\n")


def test_save_writes_markdown_and_replaces_nothing(
    environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "talk.md"
    with terminal(environment, "--system", "Be brief.") as chat:
        chat.say("hello")
        chat.expect("TTFT")
        chat.say(f"/save {file}")
        chat.expect("saved to")
        chat.say(f"/save {file}")
        chat.expect("exists: choose another name")
        chat.say(f"/save {tmp_path}/no/where")
        chat.expect("can't be written: No such file")
    assert file.read_text() == (
        "## system\n\nBe brief.\n\n## user\n\nhello\n\n## assistant\n\nYou said: hello\n"
    )


def test_the_history_outlives_the_chat_and_is_private(
    environment: dict[str, str], home: Path
) -> None:
    with terminal(environment) as chat:
        chat.say("a memorable line")
        chat.expect("TTFT")
    with terminal(environment) as chat:
        chat.expect(READY)
        chat.type(f"{UP}\r")
        chat.expect("You said: a memorable line")
    assert stat.S_IMODE((home / "chat_history").stat().st_mode) == 0o600


def test_reasoning_is_dimmed_and_not_remembered(environment: dict[str, str]) -> None:
    with terminal(environment) as chat:
        chat.say("think")
        chat.expect("Let me see. A spider...\r\n\r\nEight.\r\n")
        chat.expect("TTFT")
        assert last_request(chat)["messages"][1] == {"role": "assistant", "content": "Eight."}
    assert "\x1b[2mLet me see." in chat.raw


def test_the_model_cannot_control_the_terminal(environment: dict[str, str]) -> None:
    with terminal(environment) as chat:
        chat.say("escape")
        chat.expect("]0;ownedfine")
    assert "\x1b]0;" not in chat.raw


def test_no_server_ends_the_chat_with_one_line(environment: dict[str, str]) -> None:
    with terminal(environment, "--server", "127.0.0.1:1") as chat:
        chat.expect("unicluster: 127.0.0.1:1 refuses connections")
        assert chat.process.wait(timeout=scaled(5)) == 1


@pytest.mark.parametrize(
    ("arguments", "piped"), [(["hello", "there"], ""), ([], "hello there\n"), (["hello there"], "")]
)
def test_one_prompt_prints_only_the_answer(
    environment: dict[str, str], arguments: list[str], piped: str
) -> None:
    done = pipe(environment, *arguments, piped=piped)

    assert (done.stdout, done.stderr, done.returncode) == ("You said: hello there\n", "", 0)


def test_argument_and_piped_text_are_joined(environment: dict[str, str]) -> None:
    done = pipe(environment, "Sum this up:", piped="a long text\n")

    assert done.stdout == "You said: Sum this up:\n\na long text\n"


def test_options_of_the_command_line_are_sent(environment: dict[str, str]) -> None:
    flags = ["--system", "Be brief.", "--max-tokens", "9", "--stop", "A", "--stop", "B"]

    request = json.loads(pipe(environment, "request", *flags, "--top-p", "0.5").stdout)

    assert request == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "request"},
        ],
        "sampling": {"top_p": 0.5},
        "max_tokens": 9,
        "stop": ["A", "B"],
    }


def test_a_pipe_gets_no_reasoning_and_no_escape_codes(environment: dict[str, str]) -> None:
    assert pipe(environment, "think").stdout == "Eight.\n"


@pytest.mark.parametrize(
    ("arguments", "piped", "complaint", "code"),
    [
        ([], "", "the prompt is empty: say something to answer", 2),
        ([" "], "", "the prompt is empty: say something to answer", 2),
        ([], b"\xff\xfe", "the piped text is not UTF-8: convert it first", 2),
        (["hi", "--max-tokens=-1"], "", "max_tokens can't be -1", 2),
        (["refuse", "NOT_FOUND", "another model is served"], "", "another model is served", 2),
    ],
)
def test_errors_are_one_line_on_stderr(
    environment: dict[str, str],
    arguments: list[str],
    piped: str | bytes,
    complaint: str,
    code: int,
) -> None:
    done = pipe(environment, *arguments, piped=piped)

    assert (done.stdout, done.stderr, done.returncode) == ("", f"unicluster: {complaint}\n", code)


def test_a_server_that_loads_is_waited_for(environment: dict[str, str]) -> None:
    with terminal(environment) as chat:
        chat.say("load 2")
        chat.expect("waiting, loading: 3 of 12 GB")
        chat.expect("Loaded.")
        chat.expect("TTFT")
    assert "\r\x1b[K" in chat.raw

    done = pipe(environment, "load 2")
    assert (done.stdout, done.stderr, done.returncode) == ("Loaded.\n", "", 0)


def test_ctrl_c_ends_the_wait_and_so_does_its_bound(environment: dict[str, str]) -> None:
    with terminal(environment) as chat:
        chat.say("load 100000")
        chat.expect("waiting, loading: 3 of 12 GB")
        chat.type(CTRL_C)
        chat.expect("stopped")
        chat.expect(READY)
    done = pipe(environment, "load 100000", "--wait", "0.1")
    assert done.stdout == ""
    assert "parrot" in done.stderr
    assert "is loading" in done.stderr
    assert done.returncode == 1
    assert pipe(environment, "load 0").stdout == "Loaded.\n"


def test_an_answer_that_breaks_keeps_what_came_and_fails(environment: dict[str, str]) -> None:
    done = pipe(environment, "break UNAVAILABLE studio is gone")

    assert done.stdout == "Once upon a time\n"
    assert (done.stderr, done.returncode) == ("unicluster: studio is gone\n", 1)


def test_a_reader_that_leaves_ends_the_chat_quietly(
    environment: dict[str, str], server: ChatServer
) -> None:
    with subprocess.Popen(
        [*CHAT, "long"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "a line that a reader may not want\n"
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=scaled(10))) == ("", 141)
    until(lambda: live_answers(server) == 0)


def test_ctrl_c_ends_a_single_answer(environment: dict[str, str], server: ChatServer) -> None:
    with subprocess.Popen(
        [*CHAT, "hold"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(4) == "Once"
        process.send_signal(signal.SIGINT)
        assert (process.stderr.read(), process.wait(timeout=scaled(10))) == ("", 130)
    until(lambda: live_answers(server) == 0)
