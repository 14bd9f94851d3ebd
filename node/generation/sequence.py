"""A sequence: one prompt and its answer, with its cache, as prefill passes it to a lane."""

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from node.generation.answer import Answer
from node.generation.chunking import FirstChunks
from node.generation.prefix_cache import CachedPrefix
from node.generation.request import Job
from node.generation.sampling import LogitsProcessor, TokenChooser
from node.generation.ticket import Ticket


@dataclass(eq=False)
class Sequence:
    """One prompt and its answer; `cache` holds the first `cached` tokens of the prompt.

    The prompt is what is to be computed before the next token: a resumed answer's first part too,
    and what one decoder has decoded when another takes over. Sampler and processors go along.

    prefix: a cached prefix to begin with, and how many of its tokens are common, until prefill
    begins. recalled: in place of that, a cache of its first tokens from disk, and how many.
    first_chunks: measured times of its prefill. branchings: how many of the prompt's first tokens
    are cached where a checkpoint is to be made; checkpoints: those that are, for other prompts.
    """

    ticket: Ticket
    answer: Answer
    prefix: tuple[CachedPrefix, int] | None = None
    recalled: tuple[list[Any], int] | None = None
    cache: list[Any] = field(default_factory=list)
    cached: int = 0
    first_chunks: FirstChunks = field(default_factory=FirstChunks)
    branchings: deque[int] = field(default_factory=deque)
    checkpoints: list[CachedPrefix] = field(default_factory=list)
    prompt: list[int] = field(init=False)

    def __post_init__(self) -> None:
        resumed = self.job.resumed
        self.prompt = self.job.tokens if resumed is None else [*self.job.tokens, *resumed.tokens]

    @property
    def job(self) -> Job:
        return self.ticket.job

    @cached_property
    def chooser(self) -> TokenChooser:
        """The sampler of its tokens, with those drawn before behind it."""
        return self.job.chooser()

    @cached_property
    def processors(self) -> list[LogitsProcessor]:
        """Logits processors of its tokens; the filters come last."""
        return self.job.processors()

    def hand_over(self, tokens: list[int], cache: list[Any], cached: int) -> None:
        """Makes it ready for another decoder: all `tokens` are chosen, `cached` in the cache."""
        self.prompt, self.cache, self.cached = tokens, cache, cached

    @property
    def most(self) -> int:
        """Tokens of the sequence at its longest, prompt included."""
        return len(self.job.tokens) + self.job.max_tokens

    @property
    def left(self) -> int:
        """Prompt tokens still to prefill; the last token is left to the decoder."""
        return len(self.prompt) - 1 - self.cached
