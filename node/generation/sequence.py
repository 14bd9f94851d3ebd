"""A sequence: one prompt and its answer, with its cache, as prefill passes it to a lane."""

from dataclasses import dataclass, field
from typing import Any

from node.generation.answer import Answer
from node.generation.chunking import FirstChunks
from node.generation.prefix_cache import CachedPrefix
from node.generation.request import Job
from node.generation.ticket import Ticket


@dataclass(eq=False)
class Sequence:
    """One prompt and its answer; `cache` holds the first `cached` tokens of the prompt.

    prefix: a cached prefix to begin with, and how many of its tokens are common, until prefill
    begins. first_chunks: measured times of its prefill.
    """

    ticket: Ticket
    answer: Answer
    prefix: tuple[CachedPrefix, int] | None = None
    cache: list[Any] = field(default_factory=list)
    cached: int = 0
    first_chunks: FirstChunks = field(default_factory=FirstChunks)

    @property
    def job(self) -> Job:
        return self.ticket.job

    @property
    def prompt(self) -> list[int]:
        return self.job.tokens

    @property
    def most(self) -> int:
        """Tokens of the sequence at its longest, prompt included."""
        return len(self.prompt) + self.job.max_tokens

    @property
    def left(self) -> int:
        """Prompt tokens still to prefill; the last token is left to the decoder."""
        return len(self.prompt) - 1 - self.cached
