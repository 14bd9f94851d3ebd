"""The `unicluster` command. Each subcommand is a module with `add_arguments` and `run`."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from unicluster import __version__
from unicluster.cluster.tls_log import tap_stderr
from unicluster.errors import InputError, UniclusterError

COMMANDS = {
    "join": ("node.agent.join", "offer this machine to the cluster"),
    "token": ("unicluster.cluster.token_command", "show or rotate the cluster's join token"),
    "nodes": ("coordinator.commands.nodes", "list the machines of the cluster"),
    "plan": (
        "coordinator.commands.plan",
        "say whether a model fits, where it goes, how fast it is",
    ),
    "models": ("coordinator.commands.models", "list the models known, and what they weigh"),
    "hardware": ("coordinator.commands.hardware", "list the machines known, for plan --fleet"),
    "drain": ("coordinator.commands.drain", "before maintenance: have others take over its stages"),
    "doctor": ("node.doctor.command", "what usually goes wrong, and how to mend it"),
    "serve": ("coordinator.commands.serve", "spread a model over the machines and serve it"),
    "broker": ("coordinator.commands.broker", "a small MQTT broker, for those who have none"),
    "chat": ("unicluster.chat.command", "talk to the model that is served"),
    "bench": ("coordinator.commands.bench", "measure what is served, or a model cut up here"),
    "status": ("coordinator.commands.status", "say what is served, and how busy the machines are"),
    "demo": ("coordinator.commands.demo", "three machines in miniature on this one, and a chat"),
}
# These have ports, and log who is refused at them.
SERVERS = {"join", "serve", "bench", "demo"}
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Complains in one line, as all else here does."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def parser_for(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the one subcommand that `argv` names.

    Only its module is imported: the command starts fast, and needs no MLX to chat.
    """
    parser = Parser(
        prog="unicluster",
        description="One language model over the unified-memory machines you own.",
    )
    parser.add_argument("--version", action="version", version=f"unicluster {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and more logging")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if name == named:
            # Before anything imports gRPC, which reads its settings then.
            if name in SERVERS:
                tap_stderr()
            else:
                os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our own errors say it all
            command = import_module(module)
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command and exits: 0 done, 2 bad input, 3 does not fit, 130 Ctrl-C, else 1."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    try:
        # --debug may stand anywhere, as people type it.
        args = parser_for(argv).parse_args([word for word in argv if word != "--debug"])
        code = args.run(args)
    except UniclusterError as error:
        _complain(str(error), debug)
        code = error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; say nothing more
        code = 0
    except Exception as error:
        _complain(f"unexpected {type(error).__name__}: {error} (--debug shows where)", debug)
        code = 1
    sys.exit(code)


def _complain(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"unicluster: {' '.join(message.split())}", file=sys.stderr)
