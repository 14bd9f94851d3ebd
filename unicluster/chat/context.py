"""How full the context of a conversation is, and what to forget when it is full."""

import re
from collections.abc import Sequence

# From so full on it is said after each answer.
NOTICEABLE = 0.75
# Of a context that is full, what the oldest turns must leave free.
FREED = 0.5
_FULL = (
    re.compile(r"the prompt has (\d+) tokens and the context is (\d+)"),
    re.compile(r"the prompt has (\d+) bytes and the context of \d+ tokens holds at most (\d+)"),
)


def fullness(used: int, context: int) -> str:
    """`the context is 86 % full, 3512 of 4096 tokens`; "" while there is room, or nobody knows."""
    if not context or used < NOTICEABLE * context:
        return ""
    share = min(100, round(100 * used / context))
    return f"the context is {share} % full, {used} of {context} tokens"


def refused_as_full(message: str) -> tuple[int, int] | None:
    """Sizes of a prompt that was refused and of the context; None if that wasn't the reason.

    In tokens, or in bytes where it was not even tokenized.
    """
    found = next((match for each in _FULL if (match := each.search(message))), None)
    return (int(found[1]), int(found[2])) if found else None


def turns_to_drop(sizes: Sequence[int], fixed: int, prompt: int, context: int) -> int:
    """How many of the oldest turns to forget, so that about half of the context is free.

    sizes: characters of each turn, the oldest first. fixed: those of what stays in any case.
    prompt, context: sizes in one unit, as of `refused_as_full`. The last turn
    is forgotten too if need be.
    """
    total = sum(sizes) + fixed
    wanted = context * FREED
    left, dropped = total, 0
    for size in sizes:
        if left * prompt <= wanted * total:
            break
        left -= size
        dropped += 1
    return dropped
