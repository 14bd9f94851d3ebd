"""Commands of `unicluster` on click: options in sections, examples, names completed by a shell.

A command is the `command` of its module:

    def run(model: str, users: int) -> int: ...

    command = Command(
        run,
        arguments=[Argument("model", "a known name or a directory", complete=model_names)],
        sections={"Serving": [Option("--users", "answers at the same time", type=int, default=1)]},
        examples=["unicluster serve demo --users 4"],
    )
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

Completions = Callable[[str], Iterable[str]]  # the names that begin with a text


class Argument(click.Argument):
    """A word of a command that is no option. Arguments are those of click.Argument."""

    def __init__(
        self, name: str, meaning: str, *, complete: Completions | None = None, **attributes: Any
    ) -> None:
        super().__init__(
            [name],
            help=meaning,
            shell_complete=_completer(complete, files=True),
            **attributes,
        )


class Option(click.Option):
    """`--flag` of a command. Arguments are those of click.Option; `name` is run's parameter.

    many: takes one word or several, as in `--users 2 4`.
    """

    def __init__(
        self,
        flag: str,
        meaning: str,
        *,
        name: str | None = None,
        complete: Completions | None = None,
        many: bool = False,
        **attributes: Any,
    ) -> None:
        self.many = many
        super().__init__(
            [flag, *([name] if name is not None else [])],
            help=meaning,
            multiple=attributes.pop("multiple", many),
            shell_complete=_completer(complete, files=False),
            show_envvar="envvar" in attributes,
            **attributes,
        )


def server_option(otherwise: str) -> Option:
    """`--server HOST:PORT`. otherwise: what happens without."""
    return Option("--server", otherwise, metavar="HOST:PORT", envvar="UNICLUSTER_SERVER")


def on_command_line(name: str) -> bool:
    """Whether the running command got its parameter `name` as an argument, which ps shows."""
    context = click.get_current_context(silent=True)
    return context is not None and (
        context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    )


def debug_option() -> Option:
    """`--debug`, which stands before or after a command: `main` looks for it in all words."""
    return Option(
        "--debug",
        "show tracebacks and more logging",
        is_flag=True,
        expose_value=False,
        allow_from_autoenv=False,
    )


class Command(click.Command):
    """One subcommand, with the code that it exits with returned by `run`.

    sections: options under the headings of the help. examples: whole command lines.
    environment: the beginning of the variables that set its options, for services; `--host` of
    UNICLUSTER_JOIN is UNICLUSTER_JOIN_HOST.
    """

    def __init__(
        self,
        run: Callable[..., int],
        *,
        name: str | None = None,
        summary: str | None = None,
        arguments: Sequence[Argument] = (),
        sections: Mapping[str, Sequence[Option]] | None = None,
        examples: Sequence[str] = (),
        environment: str | None = None,
    ) -> None:
        self._sections = {name: list(options) for name, options in (sections or {}).items()}
        self._examples = examples
        params = [*arguments, *(o for options in self._sections.values() for o in options)]
        super().__init__(
            name,
            callback=run,
            params=[*params, debug_option()],
            help=summary,
            context_settings={
                "help_option_names": ["-h", "--help"],
                "auto_envvar_prefix": environment,
            },
        )
        self._environment = environment

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._spread(args))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        listed = {id(option) for options in self._sections.values() for option in options}
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        others = [option for option in options if id(option) not in listed]
        groups: Iterable[tuple[str, Sequence[click.Option]]] = [
            *self._sections.items(),
            ("Other options", others),
        ]
        for title, group in groups:
            records = [option.get_help_record(ctx) for option in group]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self._environment is not None:
            names = [self._variable(o) for options in self._sections.values() for o in options]
            with formatter.section("Environment, for services; the command line wins"):
                formatter.write_text(", ".join(names))
        write_examples(formatter, self._examples)

    def _variable(self, option: Option) -> str:
        explicit = option.envvar
        by_rule = f"{self._environment}_{option.name}".upper()
        return explicit if isinstance(explicit, str) else by_rule

    def _spread(self, args: Sequence[str]) -> list[str]:
        """`--users 2 4` as `--users 2 --users 4`, which is what click understands."""
        many = {flag for p in self.params if isinstance(p, Option) and p.many for flag in p.opts}
        words: list[str] = []
        flag = ""
        for word in args:
            if word.startswith("-"):
                flag = word if word in many else ""
            elif flag and words[-1] != flag:
                words.append(flag)
            words.append(word)
        return words


class CommandGroup(click.Group):
    """A command of several actions, each a Command."""

    def __init__(self, commands: Sequence[Command], examples: Sequence[str] = ()) -> None:
        self._examples = examples
        super().__init__(
            commands=commands,
            params=[debug_option()],
            context_settings={"help_option_names": ["-h", "--help"]},
            subcommand_metavar="ACTION ...",
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, self._examples)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Command lines as they are typed, never broken."""
    if examples:
        with formatter.section("Examples"):
            for line in examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def in_list(complete: Completions) -> Completions:
    """Completions for the last name of several with commas between, as in `ann,bob`."""

    def completed(text: str) -> Iterable[str]:
        before, comma, last = text.rpartition(",")
        chosen = before.split(",")
        return [f"{before}{comma}{name}" for name in complete(last) if name not in chosen]

    return completed


def beginning(names: Callable[[], Iterable[str]]) -> Completions:
    """Completions: the names that begin with the text, whatever its case."""
    return lambda text: [n for n in names() if n.lower().startswith(text.lower())]


def _completer(
    complete: Completions | None, *, files: bool
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]] | None:
    if complete is None:
        return None

    def items(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        items = [CompletionItem(name) for name in complete(incomplete)]
        # The shell knows files best; it is asked when nothing else is meant.
        return items or ([CompletionItem(incomplete, type="file")] if files else [])

    return items
