"""An answer that another head has begun, and its client has: read again, without being sent."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from node.answers.progress import AnswerProgress, events_of
from node.constraints.mask import Filter
from node.prompts.cancellation import Cancellation
from node.tools.reader import CallReader
from unicluster.errors import InputError
from unicluster.v1.chat_pb2 import Resume

# Between two looks whether anybody still waits for it.
LOOK_TOKENS = 256


@dataclass(frozen=True)
class Resumed:
    """The answer so far. cached_tokens: of its prompt, which the first head did not compute."""

    tokens: list[int]
    cached_tokens: int
    progress: AnswerProgress


def check_resume(resume: Resume, prompt: Sequence[int], vocabulary: int) -> None:
    """Raises InputError for what can be no part of an answer to `prompt`."""
    if (largest := max(resume.token_ids, default=0)) >= vocabulary:
        raise InputError(f"resume: {largest} is not in the vocabulary of {vocabulary} tokens")
    if resume.cached_tokens >= len(prompt):
        raise InputError(
            f"resume: {resume.cached_tokens} cached tokens of a prompt of {len(prompt)}"
        )


def read_again(
    resume: Resume,
    progress: AnswerProgress,
    calls: CallReader | None,
    filters: Iterable[Filter],
    cancellation: Cancellation,
) -> Resumed:
    """Takes the answer's text, tool calls and filters to where the other head left off.

    Blocks for some microseconds a token. Raises InputError where the tokens go on behind the
    answer's end, and AbandonedError once it is cancelled.
    """
    tokens = list(resume.token_ids)
    for at, token in enumerate(tokens):
        if at % LOOK_TOKENS == 0:
            cancellation.check()
        if progress.reason or progress.is_end(token):
            raise InputError(f"resume: the answer ends before token {at + 1} of {len(tokens)}")
        for event in events_of(progress.add(token)):
            if calls is not None:
                calls.read(event)
    for each in filters:
        each.follow(tokens)
    return Resumed(tokens, resume.cached_tokens, progress)
