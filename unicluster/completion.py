"""`unicluster completion SHELL`: the script that lets a shell complete commands and names."""

import click
from click.shell_completion import get_completion_class

from unicluster.command_line import Argument, Command
from unicluster.errors import InputError

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_UNICLUSTER_COMPLETE"


def run(shell: str) -> int:
    """Raises InputError for a shell that is not known."""
    kind = get_completion_class(shell)
    context = click.get_current_context()
    if kind is None:
        raise InputError(f"no completion for {shell}: one of {', '.join(SHELLS)}")
    print(kind(context.find_root().command, {}, "unicluster", VARIABLE).source())
    return 0


command = Command(
    run,
    arguments=[Argument("shell", "bash, zsh or fish", metavar="SHELL", type=click.Choice(SHELLS))],
    examples=[
        'eval "$(unicluster completion bash)"    # in ~/.bashrc',
        'eval "$(unicluster completion zsh)"     # in ~/.zshrc',
        "unicluster completion fish > ~/.config/fish/completions/unicluster.fish",
    ],
)
