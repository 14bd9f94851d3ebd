"""The conversation in a terminal: a prompt, streamed answers, and a few commands."""

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from unicluster.chat.context import fullness, refused_as_full, turns_to_drop
from unicluster.chat.screen import Screen
from unicluster.chat.status_line import StatusLine
from unicluster.client.answers import ChatInfo, Event, Finish, Options
from unicluster.client.client import AsyncClient
from unicluster.errors import UniclusterError
from unicluster.units import counted

COMMANDS = {
    "/help": ("", "show this"),
    "/drop": ("[N]", "forget the oldest turn, or the N oldest"),
    "/reset": ("", "forget the conversation; the system message stays"),
    "/system": ("TEXT", "set the system message; without TEXT, show it"),
    "/save": ("FILE", "write the conversation to a new file, as Markdown"),
    "/exit": ("", "leave (or press Ctrl-D)"),
}


@dataclass
class Conversation:
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """All of it, the system message first."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def add(self, question: str, answer: str) -> None:
        self.turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    def sizes(self) -> list[int]:
        """Characters of each turn, the oldest first."""
        lengths = [len(message["content"]) for message in self.turns]
        return [question + answer for question, answer in zip(*[iter(lengths)] * 2, strict=True)]

    def drop(self, count: int) -> int:
        """Forgets the oldest turns; returns how many that were."""
        dropped = min(count, len(self.turns) // 2)
        del self.turns[: 2 * dropped]
        return dropped

    def markdown(self) -> str:
        return "\n".join(
            f"## {message['role']}\n\n{message['content'].strip()}\n" for message in self.messages()
        )


class Repl:
    """Reads lines until /exit or Ctrl-D. Ctrl-C stops an answer, never the program."""

    def __init__(
        self,
        client: AsyncClient,
        session: PromptSession[str],
        screen: Screen,
        conversation: Conversation,
        options: Options,
    ) -> None:
        self._client = client
        self._session = session
        self._screen = screen
        self._conversation = conversation
        self._options = options
        self._answering: asyncio.Task[None] | None = None
        self._partial = ""
        self._context = 0  # tokens of the model's context; 0: not known
        self._used = 0  # of them by the conversation so far

    async def run(self) -> None:
        """Raises UnavailableError where there is nothing to talk to."""
        info = await self._client.describe()
        self._context = info.context
        self._screen.note(greeting(info))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._stop_answer)
        try:
            while await self._turn():
                pass
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def _turn(self) -> bool:
        """One line typed and dealt with. False: leave."""
        try:
            line = await self._session.prompt_async("> ", handle_sigint=False)
        except KeyboardInterrupt:
            if not self._session.default_buffer.text:
                self._screen.note("/exit or Ctrl-D leaves")
            return True
        except EOFError:
            return False
        if line.startswith("/"):
            return self._command(*line.split(maxsplit=1))
        if line.strip():
            await self._ask(line.strip())
        return True

    def _stop_answer(self) -> None:
        if self._answering:
            self._answering.cancel()

    async def _ask(self, question: str) -> None:
        """An answer that was stopped stays in the conversation; one that failed does not."""
        self._partial = ""
        self._answering = asyncio.create_task(self._stream(question))
        await asyncio.wait([self._answering])
        stopped, self._answering = self._answering, None
        if stopped.cancelled():
            self._screen.note("stopped")
        elif error := stopped.exception():
            if not isinstance(error, UniclusterError):
                raise error
            self._screen.error(str(error))
            if await self._make_room(question, str(error)):
                await self._ask(question)
                return
            self._screen.note("the message was not kept: press Up and Enter to send it again")
            return
        if self._partial:
            self._conversation.add(question, self._partial)
        if full := fullness(self._used, self._context):
            self._screen.note(f"{full}: /drop forgets the oldest turn, /reset all of them")

    async def _make_room(self, question: str, refusal: str) -> bool:
        """Offers to forget the oldest turns, if a question was refused for want of room."""
        full = refused_as_full(refusal)
        sizes = self._conversation.sizes()
        if full is None or not sizes:
            return False
        fixed = len(question) + len(self._conversation.system or "")
        count = turns_to_drop(sizes, fixed, *full)
        if not count:
            return False
        turns = "oldest turn" if count == 1 else f"{count} oldest turns"
        if not await self._agreed(f"forget the {turns} of {len(sizes)} and ask again? [Y/n] "):
            return False
        self._conversation.drop(count)
        return True

    async def _agreed(self, question: str) -> bool:
        """Asks the person; Ctrl-C and Ctrl-D are a no."""
        session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(), input=self._session.input, output=self._session.output
        )
        try:
            answer = await session.prompt_async(question, handle_sigint=False)
        except (KeyboardInterrupt, EOFError):
            return False
        return answer.strip().lower() in ("", "y", "yes")

    async def _stream(self, question: str) -> None:
        messages = [*self._conversation.messages(), {"role": "user", "content": question}]
        line = StatusLine(sys.stderr, self._screen)
        options: Options = {**self._options, "on_status": line.show}
        try:
            await self._hear(self._client.stream(messages, **options))
        finally:
            line.clear()

    async def _hear(self, events: AsyncGenerator[Event, None]) -> None:
        async for event in events:
            if isinstance(event, Finish):
                self._used = event.usage.prompt_tokens + event.usage.completion_tokens
                self._screen.note(summary(event))
                return
            if event.reasoning or event.tool_call:
                self._screen.reasoning(event.reasoning + event.tool_call)
            if event.text:
                self._partial += event.text
                self._screen.text(event.text)

    def _command(self, name: str, rest: str = "") -> bool:
        match name:
            case "/exit":
                return False
            case "/help":
                for command, (argument, what) in COMMANDS.items():
                    self._screen.note(f"{command + ' ' + argument:13} {what}")
                self._screen.note("Ctrl-C stops an answer, Alt-Enter begins a new line,")
                self._screen.note("and a space first sends a message that begins with /.")
            case "/drop":
                self._drop(rest.strip())
            case "/reset":
                self._conversation.turns.clear()
                self._used = 0
                self._screen.note("the conversation is forgotten")
            case "/system" if rest:
                self._conversation.system = rest
                self._screen.note("the system message is set")
            case "/system":
                self._screen.note(self._conversation.system or "there is no system message")
            case "/save":
                self._save(rest.strip())
            case _:
                self._screen.error(f"there is no command {name}: /help lists them")
        return True

    def _drop(self, number: str) -> None:
        if number and not (number.isdecimal() and int(number)):
            self._screen.error(f"/drop {number}: how many turns, 1 or more")
            return
        dropped = self._conversation.drop(int(number or 1))
        left = len(self._conversation.turns) // 2
        self._screen.note(f"{counted(dropped, 'turn')} forgotten, {left} left")

    def _save(self, name: str) -> None:
        if not name:
            self._screen.error("/save needs the name of a file")
            return
        path = Path(name).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(self._conversation.markdown())
        except FileExistsError:
            self._screen.error(f"{path} exists: choose another name")
        except OSError as error:
            self._screen.error(f"{path} can't be written: {error.strerror}")
        else:
            self._screen.note(f"saved to {path}")


def greeting(info: ChatInfo) -> str:
    machines = len({stage.node for stage in info.stages})
    parts = [
        " ".join(filter(None, (info.model, info.quant))),
        counted(machines, "machine") if machines else "",
        f"context {info.context}" if info.context else "",
        "" if info.state == "ready" else ": ".join(filter(None, (info.state, info.detail))),
        "/help lists the commands",
    ]
    return ", ".join(filter(None, parts))


def summary(finish: Finish) -> str:
    """Summary of an answer: `27 tokens, 41.3 tokens/s, TTFT 0.12 s`."""
    tokens, timings = finish.usage.completion_tokens, finish.timings
    parts = [f"{tokens} {'token' if tokens == 1 else 'tokens'}"]
    if timings.tokens_per_s:
        parts.append(f"{timings.tokens_per_s:.1f} tokens/s")
    parts.append(f"TTFT {timings.time_to_first_token_s:.2f} s")
    if drafted := finish.usage.drafted_tokens:
        parts.append(f"{finish.usage.accepted_tokens} of {drafted} drafted tokens accepted")
    if finish.reason == "length":
        parts.append("stopped at the token limit")
    return ", ".join(parts)


class CommandCompleter(Completer):
    """Tab completes a command at the beginning of the line."""

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if not typed.startswith("/"):
            return
        for name, (argument, what) in COMMANDS.items():
            if name.startswith(typed):
                text = f"{name} " if argument else name
                yield Completion(text, start_position=-len(typed), display=name, display_meta=what)


def terminal_session(history: Path, screen: Screen) -> PromptSession[str]:
    """Line editing, with a history that only its owner can read."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=_open_history(history, screen),
        completer=CommandCompleter(),
        complete_while_typing=False,
        key_bindings=keys,
    )


def _open_history(path: Path, screen: Screen) -> History:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)  # where it was there before
    except OSError as error:
        screen.note(f"what you type is forgotten at the end: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(path)
