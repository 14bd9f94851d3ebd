"""The `unicluster` command. Each subcommand is the `command` of a module, imported when used."""

import faulthandler
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import click
from click.shell_completion import CompletionItem, shell_complete

from unicluster import __version__
from unicluster.command_line import debug_option, write_examples
from unicluster.completion import VARIABLE
from unicluster.errors import UniclusterError
from unicluster.terminal.logs import drain, log_to_stderr
from unicluster.terminal.output import open_standard_files, wrapped

# By section of the help: where each command is, and its summary.
SECTIONS = {
    "Machines": {
        "join": ("node.agent.join", "offer this machine to the cluster"),
        "token": ("unicluster.access.token_command", "show or rotate the cluster's join token"),
        "login": ("unicluster.access.login", "get access to a cluster's chat, and no more"),
        "nodes": ("coordinator.commands.nodes", "list the machines of the cluster"),
        "drain": (
            "coordinator.commands.drain",
            "before maintenance: have others take over its stages",
        ),
        "doctor": ("node.doctor.command", "check for common problems, and how to fix them"),
    },
    "Models": {
        "plan": (
            "coordinator.commands.plan",
            "say whether a model fits, where it goes, how fast it is",
        ),
        "models": ("coordinator.commands.models", "list the models known, and what they weigh"),
        "hardware": (
            "coordinator.commands.hardware",
            "list the machines known, for plan --fleet",
        ),
    },
    "Serving": {
        "serve": ("coordinator.commands.serve", "spread a model over the machines and serve it"),
        "chat": ("unicluster.chat.command", "talk to the model that is served"),
        "key": ("coordinator.commands.key", "make and end keys of the HTTP door"),
        "status": (
            "coordinator.commands.status",
            "say what is served, and how busy the machines are",
        ),
        "rebalance": (
            "coordinator.commands.rebalance",
            "move layers to where they are faster, if anywhere",
        ),
        "events": ("coordinator.commands.events", "say what has happened to what was served"),
        "bench": ("coordinator.commands.bench", "measure what is served, or a model cut up here"),
        "demo": (
            "coordinator.commands.demo",
            "three machines in miniature on this one, and a chat",
        ),
    },
    "Shell": {
        "completion": ("unicluster.completion", "print what makes a shell complete all this"),
    },
}
COMMANDS = {name: place for commands in SECTIONS.values() for name, place in commands.items()}
EXAMPLES = (
    "unicluster demo                           # all of it in miniature, on this machine",
    "unicluster join                           # on each machine",
    "unicluster serve deepseek-r1 --quant q4   # on one of them",
    "unicluster chat                           # on any",
)
INTERRUPTED = 130
READER_GONE = 141  # 128 and the number of SIGPIPE, as shells say it of other tools


class Commands(click.Group):
    """All subcommands. Only the module of the one that runs is imported: it starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, summary = COMMANDS[cmd_name]
        command: click.Command = import_module(module).command
        command.name, command.help = cmd_name, f"{summary[0].upper()}{summary[1:]}."
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:  # click looks among those that are imported only
            raise click.NoSuchCommand(args[0], possibilities=COMMANDS, ctx=ctx) from error

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        return [
            *(
                CompletionItem(name, help=summary)
                for name, (_, summary) in COMMANDS.items()
                if name.startswith(incomplete)
            ),
            *click.Command.shell_complete(self, ctx, incomplete),
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, summary) for name, (_, summary) in commands.items()])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        click.Command.format_options(self, ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, EXAMPLES)


def _print_version(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        click.echo(f"unicluster {__version__}")
        ctx.exit()


program = Commands(
    "unicluster",
    help="One language model over the unified-memory machines you own.",
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="show the version",
        ),
        debug_option(),
    ],
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="COMMAND ...",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command and exits: 0 done, 2 bad input, 3 does not fit, 130 Ctrl-C, else 1.

    141 without a word where the reader of its output has gone.
    """
    open_standard_files()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in (words[: words.index("--")] if "--" in words else words)
    _set_up(debug)
    if instruction := os.environ.get(VARIABLE):
        sys.exit(shell_complete(program, {}, "unicluster", VARIABLE, instruction))
    try:
        with program.make_context("unicluster", words or ["--help"]) as context:
            code = program.invoke(context)
    except click.exceptions.Exit as ended:  # --help and --version
        code = ended.exit_code
    except click.UsageError as error:
        _complain(_in_one_line(error), debug)
        code = error.exit_code
    except UniclusterError as error:
        _complain(str(error), debug)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # Python flushes what is left at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = READER_GONE
    except Exception as error:
        _complain(f"unexpected {type(error).__name__}: {error} (--debug shows where)", debug)
        code = 1
    sys.exit(code)


def _set_up(debug: bool) -> None:
    """The log, and gRPC's own, which it reads from the environment when it is imported."""
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # the last words of a crash in C
    log_to_stderr(logging.DEBUG if debug else logging.WARNING)
    if debug:
        # Logs who was refused at a port, and why: only gRPC knows.
        os.environ.setdefault("GRPC_TRACE", "handshaker")
        os.environ.setdefault("GRPC_VERBOSITY", "info")
    else:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our own errors say it all


def _in_one_line(error: click.UsageError) -> str:
    message = error.format_message().strip()
    message = message[:1].lower() + message[1:]
    path = error.ctx.command_path if error.ctx is not None else "unicluster"
    if message.endswith("?"):
        return f"{message} See `{path} --help`"
    return f"{message.rstrip('.')}; see `{path} --help`"


def _complain(message: str, debug: bool) -> None:
    drain()
    if debug:
        traceback.print_exc()
    line = f"unicluster: {' '.join(message.split())}"
    print(wrapped(line, sys.stderr), file=sys.stderr)
