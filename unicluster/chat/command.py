"""`unicluster chat`: a conversation in a terminal, or one answer to a prompt."""

import argparse
import asyncio
import os
import sys
from typing import cast

from unicluster.chat.screen import Screen
from unicluster.client.answers import Delta, Options
from unicluster.client.client import AsyncClient
from unicluster.cluster.trust import Store
from unicluster.errors import InputError, UnavailableError

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `unicluster chat`, as `run` expects them."""
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="answer this and exit")
    parser.add_argument("--server", metavar="HOST:PORT", help="else it is found by mDNS")
    parser.add_argument("--model", help="fail unless this model is served")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write where the time of the one answer went, for chrome://tracing or Perfetto",
    )
    parser.add_argument("--stop", metavar="TEXT", action="append", help="end the answer before it")
    for name, (kind, meaning) in _SAMPLING.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, metavar="N", help=meaning)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code. Without a prompt or piped text, opens a conversation."""
    names = ("model", "stop", *_SAMPLING)
    options = cast(Options, {name: getattr(args, name) for name in names})
    prompt = _prompt(args.prompt)
    if args.trace is not None:
        if prompt is None:
            raise InputError("--trace needs a PROMPT: it is of one answer")
        options["trace"] = True
    return run_chat(args.server, prompt, system=args.system, options=options, trace=args.trace)


def run_chat(
    server: str | None = None,
    prompt: str | None = None,
    *,
    system: str | None = None,
    options: Options | None = None,
    trace: str | None = None,
) -> int:
    """Answers `prompt` on stdout, or talks with the person at the terminal where it is None.

    `trace` is the file for where the answer's time went. Returns the exit code. Raises the errors
    of AsyncClient, InputError where a file can't be written, and KeyboardInterrupt.
    """
    try:
        asyncio.run(chat(server, prompt, system, options, trace))
    except BrokenPipeError:
        # The reader has enough. Python would complain about what is left when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


async def chat(
    server: str | None,
    prompt: str | None = None,
    system: str | None = None,
    options: Options | None = None,
    trace: str | None = None,
) -> None:
    """The same within a running event loop."""
    options = options or Options()
    async with AsyncClient(server) as client:
        if prompt is not None:
            await _answer(client, prompt, system, options, trace)
            return
        # Here, because one answer to a pipe needs no prompt_toolkit.
        from unicluster.chat.repl import Conversation, Repl, terminal_session

        screen = Screen(sys.stdout)
        session = terminal_session(Store().folder / "chat_history", screen)
        await Repl(client, session, screen, Conversation(system), options).run()


async def _answer(
    client: AsyncClient, prompt: str, system: str | None, options: Options, trace: str | None
) -> None:
    """Only the answer: no reasoning, no numbers."""
    messages = [{"role": "user", "content": prompt}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    screen = Screen(sys.stdout)
    try:
        async for event in client.stream(messages, **options):
            if isinstance(event, Delta):
                screen.text(event.text)
            elif trace is not None:
                if event.trace is None:
                    raise UnavailableError("the server sent no trace: does it run this version?")
                event.trace.save(trace)
    finally:
        screen.end_line()


def _prompt(words: list[str]) -> str | None:
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
