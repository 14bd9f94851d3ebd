"""The errors that users and callers meet. Each message is one line: what, where, what to do."""

# Characters: mlx names every weight that is missing, and there may be thousands.
LONGEST_REASON = 300


def in_one_line(error: BaseException) -> str:
    """Message of another library's error in one line, for the end of one of ours."""
    return shortened(str(error)) or type(error).__name__


def shortened(text: str, most: int = LONGEST_REASON) -> str:
    """`text` in one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}…"


def shown(text: str) -> str:
    """`text` in quotes, short and without control characters, for a message."""
    return repr(text if len(text) <= 80 else f"{text[:80]}…")


def printable(text: str) -> str:
    """`text` with all that could steer a terminal, and lone surrogates, written as escapes."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == "\t" else char.encode("unicode_escape").decode()
        for char in text
    )


class UniclusterError(Exception):
    """Base of all errors of this project. `exit_code` is what the command exits with."""

    exit_code = 1


class InputError(UniclusterError):
    """Invalid input: a flag, a model, a prompt."""

    exit_code = 2


class DoesNotFitError(UniclusterError):
    """The model needs more memory than the machines have."""

    exit_code = 3


class TrustError(UniclusterError):
    """No cluster here, a wrong token, or a peer that is not of this cluster."""


class UnavailableError(UniclusterError):
    """A machine or the service can't be reached, or went away. The message names it."""


class StoppingError(UnavailableError):
    """The server is ending: its successor may answer who asks again."""


class BusyError(UniclusterError):
    """The queue is full: try again later."""


class NotFoundError(UniclusterError):
    """The model asked for is not the one served, or does not exist."""

    exit_code = 2


class StageError(UniclusterError):
    """A stage could not load, or failed while computing. The message names the machine."""


class StuckError(StageError):
    """A stage lives, and its work does not move. The message names the machine and the work."""


class AnswerError(StageError):
    """One answer can't go on, wherever it is computed: others are not touched."""
