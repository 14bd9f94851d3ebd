"""Chat templates, rendered in child processes that can be ended; see `render`."""

import logging
import subprocess
import threading
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from node.prompts.cancellation import Cancellation
from node.prompts.conversation import Conversation, Unread
from node.prompts.render import read, write
from unicluster.errors import InputError, in_one_line
from unicluster.program import child_environment, module_command

log = logging.getLogger(__name__)

PROGRAM = "node.prompts.render"
# Of one prompt; far more than its limit of CPU time, because the machine may be busy.
DEADLINE_S = 30.0
# Kept ready: starting one takes a second.
MOST_IDLE = 2
# Of an answer's JSON, for one character of text, and for one unread field of a message.
JSON_BYTES = 12
UNREAD_BYTES = 256


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


def variables_of(tokenizer: Any) -> dict[str, Any]:
    """Variables of a template besides the messages: special tokens, and whether to think."""
    special = {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()}
    return {**special, "enable_thinking": bool(tokenizer.has_thinking)}


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)


class Templates:
    """Renders in a child that is idle, or in a new one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Child] = []

    def warm(self) -> None:
        """Starts a child ahead of the first prompt, if there is none."""
        with self._lock:
            if not self._idle:
                self._idle.append(_Child())

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
        """The prompt as text; blocks. Raises InputError where the template refuses, is ended, or
        leaves out a part of the conversation.
        """
        request = {
            "template": template,
            "messages": conversation.messages,
            "tools": conversation.tools,
            "variables": variables,
            "arguments": conversation.arguments,
            "most_characters": most_characters,
        }
        most_bytes = (
            JSON_BYTES * most_characters + UNREAD_BYTES * len(conversation.messages) + 2**20
        )
        child = self._take()
        with cancellation.ending(child.kill):
            answered = child.ask(request, most_bytes, deadline_s)
        if answered is None:
            child.kill()
            log.warning("a chat template was ended: it takes too long or needs too much memory")
            raise _refused("it takes too long or needs too much memory")
        self._put(child)
        if "error" in answered:
            raise _refused(" ".join(str(answered["error"]).split()))
        conversation.refuse_unread(Unread(**answered["unread"]))
        return str(answered["text"])

    def _take(self) -> "_Child":
        with self._lock:
            while self._idle:
                if (child := self._idle.pop()).alive:
                    return child
        return _Child()

    def _put(self, child: "_Child") -> None:
        with self._lock:
            if len(self._idle) < MOST_IDLE:
                self._idle.append(child)
                return
        child.kill()


def _refused(reason: str) -> InputError:
    short = in_one_line(Exception(reason))
    return InputError(f"messages: the model's chat template refuses them: {short}")


class _Child:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            module_command(PROGRAM),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(),
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(
        self, request: dict[str, Any], most_bytes: int, deadline_s: float
    ) -> dict[str, Any] | None:
        """The answer; None where the child has ended, or was killed, before it."""
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a child without pipes")
        timer = threading.Timer(deadline_s, self.kill)
        timer.daemon = True
        timer.start()
        try:
            write(process.stdin, request)  # type: ignore[arg-type]  # typed as any kind of stream
            return read(process.stdout, most_bytes)  # type: ignore[arg-type]
        except BrokenPipeError:
            return None
        finally:
            timer.cancel()

    def kill(self) -> None:
        """Ends it now; from any thread, more than once."""
        if self.alive:
            self._process.kill()
            self._process.wait()


# One for the process: templates come with the requests.
TEMPLATES = Templates()
