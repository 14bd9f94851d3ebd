"""An answer in the making and its cache: what lanes and prefill hand to one another."""

from dataclasses import dataclass, field
from typing import Any

from node.generation.answer import Answer
from node.generation.chunking import Beginning
from node.generation.prefix_cache import Kept
from node.generation.request import Job
from node.generation.ticket import Ticket


@dataclass(eq=False)
class Sequence:
    """`cache` holds the first `cached` tokens of the prompt, some maybe those of `kept`.

    `began`: its first chunks.
    """

    ticket: Ticket
    answer: Answer
    kept: tuple[Kept, int] | None = None
    cache: list[Any] = field(default_factory=list)
    cached: int = 0
    began: Beginning = field(default_factory=Beginning)

    @property
    def job(self) -> Job:
        return self.ticket.job

    @property
    def prompt(self) -> list[int]:
        return self.job.tokens

    @property
    def most(self) -> int:
        """Tokens it may come to, prompt included."""
        return len(self.prompt) + self.job.max_tokens

    @property
    def left(self) -> int:
        """Prompt tokens to prefill; the last one is the decoder's."""
        return len(self.prompt) - 1 - self.cached
