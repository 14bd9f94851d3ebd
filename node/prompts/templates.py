"""Chat templates, rendered in child processes that can be ended; see `render`."""

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from node.prompts.cancellation import Cancellation
from node.prompts.conversation import Conversation, Unread
from node.prompts.render import LENGTH, read, write
from unicluster.errors import BusyError, InputError, UnavailableError, in_one_line
from unicluster.program import child_environment, module_command

log = logging.getLogger(__name__)

PROGRAM = "node.prompts.render"
# Of one prompt; far more than its limit of CPU time, because the machine may be busy.
DEADLINE_S = 30.0
# Of CPU time: real templates take milliseconds.
SLOW_SECONDS = 0.25
MOST_SLOW = 4
MOST_AT_ONCE = 2 * MOST_SLOW
LOW_PRIORITY = 15
# Of an answer's JSON, for one character of text, and for one unread field of a message.
JSON_BYTES = 12
UNREAD_BYTES = 256
_TOOLS = re.compile(r"\btools\b")


def template_of(tokenizer: Any, with_tools: bool = False) -> str | None:
    """The template by which a tokenizer of mlx-lm renders chats, where it is one of jinja.

    Some models have another one for conversations with tools.

    None for formats that are written in Python in mlx-lm or transformers: no file of a model has
    those. Raises InputError where a model has several templates, none of which is the default.
    """
    if getattr(tokenizer, "_chat_template", None) is not None:
        return None
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    plain = getattr(type(inner), "apply_chat_template", None)
    if plain is not PreTrainedTokenizerBase.apply_chat_template and not getattr(
        inner, "renders_by_template", False
    ):
        return None
    try:
        return str(inner.get_chat_template(tools=[] if with_tools else None))
    except ValueError as error:
        raise InputError(f"messages: {in_one_line(error)}") from error


def shows_tools(tokenizer: Any) -> bool:
    """Whether a tokenizer's chats may have tools: its template names them, or is a Python format.

    A template is not rendered for this: one that names tools may still refuse some.
    """
    if not tokenizer.has_chat_template:
        return False
    try:
        template = template_of(tokenizer, with_tools=True)
    except InputError:
        return False
    return template is None or _TOOLS.search(template) is not None


def variables_of(tokenizer: Any) -> dict[str, Any]:
    """Variables of a template besides the messages: special tokens, and whether to think."""
    special = {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()}
    return {**special, "enable_thinking": bool(tokenizer.has_thinking)}


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)


class Templates:
    """Renders each prompt in a child of its own, forked from one process that stands ready.

    A render that has taken SLOW_SECONDS of CPU time goes on at a low priority, as one of MOST_SLOW
    at most: so those that loop leave time to others. Call `render` from MOST_AT_ONCE threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._slow = 0

    def warm(self) -> None:
        """Starts the process ahead of the first prompt."""
        with self._lock:
            self._started()

    def render(
        self,
        template: str,
        conversation: Conversation,
        variables: dict[str, Any],
        most_characters: int,
        cancellation: Cancellation,
        *,
        deadline_s: float = DEADLINE_S,
    ) -> str:
        """The prompt as text; blocks.

        Raises InputError where the template refuses, is ended, or leaves out a part of the
        conversation, and BusyError where it is slow while others are.
        """
        request = {
            "template": template,
            "messages": conversation.messages,
            "tools": conversation.tools,
            "variables": variables,
            "arguments": conversation.arguments,
            "wishes": conversation.wishes,
            "most_characters": most_characters,
        }
        most_bytes = (
            JSON_BYTES * most_characters + UNREAD_BYTES * len(conversation.messages) + 2**20
        )
        child = self._fork()
        try:
            with cancellation.ending(child.kill), self._slowness(child, deadline_s):
                answered = child.ask(request, most_bytes)
        finally:
            child.close()
        if child.crowded_out:
            raise BusyError("prompts that take long to render are being rendered; try again later")
        if answered is None:
            log.warning("a chat template was ended: it takes too long or needs too much memory")
            raise _refused("it takes too long or needs too much memory")
        if "error" in answered:
            raise _refused(" ".join(str(answered["error"]).split()))
        conversation.refuse_unread(Unread(**answered["unread"]))
        conversation.granted = set(answered["granted"])
        return str(answered["text"])

    @contextmanager
    def _slowness(self, child: "_Child", deadline_s: float) -> Iterator[None]:
        """Looks after a child that does not answer soon, while the block runs."""
        counted = ended = False
        timers: list[threading.Timer] = []

        def after(seconds: float, action: Callable[[], None]) -> None:
            timers.append(timer := threading.Timer(seconds, action))
            timer.daemon = True
            timer.start()

        def slow() -> None:
            nonlocal counted
            with self._lock:
                if ended:
                    return
                if child.cpu_seconds() < SLOW_SECONDS:
                    after(SLOW_SECONDS, slow)  # it is the machine that is slow
                    return
                if self._slow >= MOST_SLOW:
                    child.crowded_out = True
                    child.kill()
                    return
                self._slow += 1
                counted = True
                child.yield_to_others()

        after(SLOW_SECONDS, slow)
        after(deadline_s, child.kill)
        try:
            yield
        finally:
            with self._lock:
                ended = True
                self._slow -= counted
            for timer in timers:
                timer.cancel()

    def _fork(self) -> "_Child":
        """A child that waits for a request."""
        for _ in range(2):  # the process may have been ended since
            ours, theirs = socket.socketpair()
            with self._lock, theirs:
                control = self._started()
                try:
                    socket.send_fds(control, [b"."], [theirs.fileno()])
                except OSError:
                    self._forget(control)
            child = _Child(ours)
            if child.forked:
                return child
            child.close()
            with self._lock:
                self._forget(control)
        raise UnavailableError("the process that renders chat templates does not start")

    def _forget(self, control: socket.socket) -> None:
        """Has the next prompt start another process, if that is still the one."""
        if control is self._control:
            control.close()
            self._control = None

    def _started(self) -> socket.socket:
        if self._control is None:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    module_command(PROGRAM),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=child_environment(),
                )
            self._control = ours
        return self._control


def _refused(reason: str) -> InputError:
    short = in_one_line(Exception(reason))
    return InputError(f"messages: the model's chat template refuses them: {short}")


class _Child:
    """One child, from its fork to its answer. `crowded_out`: ended in favour of others."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rwb")
        self._lock = threading.Lock()
        self._pid = 0  # 0 when it has ended, or never was
        self.crowded_out = False
        prefix = self._stream.read(LENGTH.size)
        if len(prefix) == LENGTH.size:
            (self._pid,) = LENGTH.unpack(prefix)

    @property
    def forked(self) -> bool:
        return bool(self._pid)

    def ask(self, request: dict[str, Any], most_bytes: int) -> dict[str, Any] | None:
        """The answer; None where the child has ended, or was killed, before it."""
        try:
            write(self._stream, request)
            return read(self._stream, most_bytes)
        except (BrokenPipeError, ConnectionResetError):
            return None

    def cpu_seconds(self) -> float:
        """CPU time that it has taken."""
        try:
            times = psutil.Process(self._pid).cpu_times() if self._pid else None
        except psutil.NoSuchProcess:
            times = None
        return times.user + times.system if times is not None else 0.0

    def yield_to_others(self) -> None:
        """Lowers its priority."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._pid:
                os.setpriority(os.PRIO_PROCESS, self._pid, LOW_PRIORITY)

    def kill(self) -> None:
        """Ends it now; from any thread, more than once."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._pid:
                os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends it, if it has not ended, and the connection."""
        self.kill()
        with self._lock:
            self._pid = 0
        with contextlib.suppress(OSError):
            self._stream.close()
        self._connection.close()


# One for the process: templates come with the requests.
TEMPLATES = Templates()
