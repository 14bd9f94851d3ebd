"""`unicluster chat`: a conversation in a terminal, or one answer to a prompt."""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any, cast

import click

from unicluster.chat.screen import Screen
from unicluster.chat.status_line import StatusLine
from unicluster.client.answers import Delta, Options, deadline_of, request_to_wire
from unicluster.client.client import AsyncClient
from unicluster.client.returning import RETURN_SECONDS, Patience
from unicluster.cluster.idle import idle
from unicluster.command_line import Argument, Command, Option, server_option
from unicluster.errors import InputError, UnavailableError
from unicluster.terminal.waiting import doing
from unicluster.trust.store import Store

WAIT_SECONDS = 300.0
NOTHING = "nothing is served in this cluster: run `unicluster serve`, or name a server by --server"
_SAMPLING = {
    "temperature": (float, "0: always the most likely token"),
    "top_p": (float, "sample from the most likely tokens that add up to this probability"),
    "top_k": (int, "sample from this many most likely tokens"),
    "min_p": (float, "leave out tokens less likely than this share of the most likely one"),
    "repetition_penalty": (float, "above 1: repeat less"),
    "presence_penalty": (float, "above 0: fewer tokens that occurred already"),
    "frequency_penalty": (float, "above 0: fewer tokens that occurred often"),
    "seed": (int, "the same seed samples the same answer"),
    "max_tokens": (int, "the longest answer"),
    "deadline": (float, "seconds after which an answer that is not complete is given up"),
}


def run(
    prompt: tuple[str, ...],
    server: str | None,
    model: str | None,
    system: str | None,
    trace: str | None,
    stop: tuple[str, ...],
    resume: float | None,
    wait: float,
    **sampling: Any,
) -> int:
    """Returns the exit code. Without a prompt or piped text, opens a conversation."""
    options = cast(Options, {"model": model, "stop": list(stop) or None, **sampling})
    text = _prompt(prompt)
    if trace is not None:
        if text is None:
            raise InputError("--trace needs a PROMPT: it records one answer")
        options["trace"] = True
    patience = Patience(resume, wait)
    return run_chat(server, text, system=system, options=options, trace=trace, patience=patience)


def run_chat(
    server: str | None = None,
    prompt: str | None = None,
    *,
    system: str | None = None,
    options: Options | None = None,
    trace: str | None = None,
    patience: Patience | None = None,
) -> int:
    """Answers `prompt` on stdout, or talks with the person at the terminal where it is None.

    `trace` is the file for where the answer's time went. Returns the exit code. Raises the errors
    of AsyncClient, InputError where a file can't be written, KeyboardInterrupt, and
    BrokenPipeError where the reader of standard output has gone.
    """
    asyncio.run(chat(server, prompt, system, options, trace, patience))
    return 0


async def chat(
    server: str | None,
    prompt: str | None = None,
    system: str | None = None,
    options: Options | None = None,
    trace: str | None = None,
    patience: Patience | None = None,
) -> None:
    """Answers `prompt`, or holds a conversation, within a running event loop."""
    options = options or Options()
    messages = _messages(prompt, system)
    if messages:  # what can't be asked is said before anything is looked for
        request_to_wire(messages, options)
        deadline_of(options)
    patience = patience or Patience()
    async with AsyncClient(server, resume=patience.resume, wait=patience.wait) as client:
        if not server:
            with doing("Looking for what is served"):
                if not await client.find_here() and await idle(Store().load()):
                    raise UnavailableError(NOTHING)
                await client.find()
        if messages:
            await _answer(client, messages, options, trace)
            return
        # Here, because one answer to a pipe needs no prompt_toolkit.
        from unicluster.chat.repl import Conversation, Repl, terminal_session

        screen = Screen(sys.stdout)
        session = terminal_session(Store().folder / "chat_history", screen)
        await Repl(client, session, screen, Conversation(system), options).run()


def _messages(prompt: str | None, system: str | None) -> list[dict[str, str]]:
    """The messages of one question; none where there is no prompt."""
    if prompt is None:
        return []
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


async def _answer(
    client: AsyncClient, messages: list[dict[str, str]], options: Options, trace: str | None
) -> None:
    """Only the answer: no reasoning, no numbers."""
    screen = Screen(sys.stdout)
    line = StatusLine(sys.stderr, screen)
    options = {**options, "on_status": line.show}
    try:
        async for event in client.stream(messages, **options):
            if isinstance(event, Delta):
                screen.text(event.text)
            elif trace is not None:
                if event.trace is None:
                    raise UnavailableError("the server sent no trace: does it run this version?")
                event.trace.save(trace)
    finally:
        line.clear()
        screen.end_line()


def _prompt(words: Sequence[str]) -> str | None:
    """The prompt of the command line and the piped text; None: there is a person to ask."""
    parts = [" ".join(words)] if words else []
    if not sys.stdin.isatty():
        try:
            parts.append(sys.stdin.buffer.read().decode())
        except UnicodeDecodeError as error:
            raise InputError("the piped text is not UTF-8: convert it first") from error
    elif not parts:
        if sys.stdout.isatty():
            return None
        raise InputError("there is no prompt: give it as an argument or by a pipe")
    return "\n\n".join(part.strip() for part in parts if part.strip())


command = Command(
    run,
    arguments=[Argument("prompt", "answer this and exit", nargs=-1)],
    sections={
        "Where": [
            server_option("default: it is found by mDNS"),
            Option("--model", "fail unless this model is served"),
            Option(
                "--wait",
                "how long to wait for a server that loads or recovers "
                f"(default: {WAIT_SECONDS:g}; 0: not at all)",
                type=float,
                default=WAIT_SECONDS,
                metavar="SECONDS",
            ),
            Option(
                "--resume",
                "have the server keep an answer for so long when its connection is lost "
                f"(default: not, and its rest is asked for within {RETURN_SECONDS:g} seconds)",
                type=float,
                metavar="SECONDS",
            ),
        ],
        "Conversation": [
            Option("--system", "the system message", metavar="TEXT"),
            Option("--stop", "end the answer before it", metavar="TEXT", multiple=True),
            Option(
                "--trace",
                "write where the time of the one answer went, for chrome://tracing or Perfetto",
                metavar="FILE",
                type=click.Path(dir_okay=False),
            ),
        ],
        "Sampling": [
            Option("--" + name.replace("_", "-"), meaning, type=kind, metavar="N")
            for name, (kind, meaning) in _SAMPLING.items()
        ],
    },
    examples=[
        "unicluster chat",
        'unicluster chat "Tell me a story about a fox." --temperature 0',
        'git diff | unicluster chat "Review this."',
    ],
)
