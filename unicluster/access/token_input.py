"""Tokens handed to a command: by a file, standard input or the environment.

All users of a machine see its command lines; of these three they see nothing.
"""

import getpass
import logging
import os
import sys
from pathlib import Path

from unicluster.command_line import Option, on_command_line
from unicluster.errors import InputError

log = logging.getLogger(__name__)

JOIN_VARIABLE = "UNICLUSTER_TOKEN"
CLIENT_VARIABLE = "UNICLUSTER_CLIENT_TOKEN"
# Longer than any token; a file that is none is not read whole.
MOST_CHARACTERS = 4096


def join_token_options() -> list[Option]:
    """`--token` and `--token-file`, to be read by `read_join_token`."""
    return [
        Option(
            "--token",
            "join token of an existing cluster; it is kept. -: read it from standard input. The "
            "token itself, as an argument, shows in ps",
            metavar="-",
            envvar=JOIN_VARIABLE,
        ),
        Option("--token-file", "read the join token from this file", metavar="FILE"),
    ]


def read_join_token(token: str | None, file: str | None) -> str | None:
    """The join token of `--token` or `--token-file`; None without either.

    Raises InputError for both at once, and for a file that can't be read.
    """
    os.environ.pop(JOIN_VARIABLE, None)  # no child process needs it
    typed = on_command_line("token")
    if file is not None and (token is None or not typed):
        return read_token_file(file)
    if file is not None:
        raise InputError("--token, --token-file: give only one of them")
    if token == "-":  # noqa: S105  # stands for standard input
        return read_typed_token("Join token: ")
    if token is not None and typed:
        log.warning(
            "--token TOKEN shows in ps to all users of this machine: better --token -, "
            "--token-file FILE, or %s in the environment",
            JOIN_VARIABLE,
        )
    return token


def read_client_token(file: str | None) -> str:
    """The client token in `file`, else in $UNICLUSTER_CLIENT_TOKEN, else on standard input.

    Raises InputError for a file that can't be read.
    """
    variable = os.environ.pop(CLIENT_VARIABLE, None)
    if file is not None:
        return read_token_file(file)
    return variable or read_typed_token("Client token: ")


def read_token_file(file: str) -> str:
    """Text of a file. Raises InputError when it can't be read."""
    try:
        with Path(file).expanduser().open(encoding="ascii", errors="replace") as opened:
            return opened.read(MOST_CHARACTERS)
    except OSError as error:
        raise InputError(f"--token-file {file}: {error.strerror}") from error


def read_typed_token(prompt: str) -> str:
    """A line of standard input, asked for and not echoed where that is a terminal."""
    if sys.stdin.isatty():
        return getpass.getpass(prompt)
    return sys.stdin.readline(MOST_CHARACTERS)
