"""Drafting for speculative decoding: tokens are guessed, and the model verifies several at once."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from node.mlx.rollback import restore, snapshot, trim, trimmable_below
from unicluster.v1.node_pb2 import StageSpec

# Tokens at the end of a text that must match an earlier place, and that are compared at most.
MIN_MATCH = 2
MAX_MATCH = 8
# Lengths of matches from which on guesses are of another sort, and how often those may be right.
MATCHES = ((MIN_MATCH, 0.2), (3, 0.3), (5, 0.4), (MAX_MATCH, 0.5))
# Tokens drafted at a time, where the options don't say.
MAX_DRAFTED = 8
# Prompt tokens a draft model computes at a time; a fraction of what the model itself takes.
DRAFT_CHUNK = 256


class Drafter(Protocol):
    """Drafts tokens for one answer at a time."""

    def propose(self, tokens: list[int], count: int, ahead: Sequence[int] = ()) -> list[int]:
        """At most `count` tokens that may come after `tokens`, the prompt included, and `ahead`.

        Later calls for an answer pass the identical list, which has grown meanwhile; `ahead` are
        guesses that nobody has verified yet.
        """
        ...


@dataclass(frozen=True)
class Speculation:
    """Settings of speculative decoding: at most `most` tokens a draft, by one drafter a lane.

    piped: with other stages, each guess is a frame of its own, sent without waiting for the one
    before; else several are verified in one frame. free: drafts cost next to nothing, and are made
    to see how often they would be right also while nothing is guessed. auto: only where that was
    measured to help, else there is none.
    """

    drafter: Callable[[], Drafter]
    most: int
    piped: bool = False
    free: bool = False
    auto: bool = False

    @property
    def mode(self) -> str:
        """The source of guesses, in a word: auto, lookup or model."""
        return "auto" if self.auto else "lookup" if self.free else "model"

    @classmethod
    def of(cls, spec: StageSpec, draft: Any, vocabulary: int) -> "Speculation | None":
        """Speculation as the stage's options ask for it; None for none.

        `draft`: the draft model, if there is one. `vocabulary`: tokens of the model.
        """
        most = spec.draft_tokens or MAX_DRAFTED
        if draft is not None:
            return cls(partial(DraftModel, draft, vocabulary), most, spec.piped)
        if spec.auto_speculation:
            return cls(Lookup, most, piped=True, free=True, auto=True)
        return cls(Lookup, most, spec.piped, free=True) if spec.lookup else None


class Lookup:
    """Prompt lookup: drafts the tokens that followed the last earlier match of the text's end.

    sort: index in MATCHES of how long the match of the latest draft was.
    """

    def __init__(self) -> None:
        self.sort = 0
        self._tokens: list[int] | None = None
        self._copy = array("q")

    def propose(self, tokens: list[int], count: int, ahead: Sequence[int] = ()) -> list[int]:
        if tokens is not self._tokens:
            self._tokens, self._copy = tokens, array("q")
        self._copy.extend(tokens[len(self._copy) :])
        text = np.frombuffer(self._copy, dtype=np.int64)
        if ahead:
            text = np.concatenate([text, np.array(ahead, dtype=np.int64)])
        start, length = _follows(text)
        if not length:
            return []
        self.sort = max(i for i, (least, _) in enumerate(MATCHES) if length >= least)
        # A match that overlaps the end is a repetition, and continued as one.
        period = len(text) - start
        return [int(text[start + index % period]) for index in range(count)]


def expected_rates(drafter: Drafter) -> tuple[float, ...]:
    """Rates of right guesses to begin with, of each sort of a drafter's guesses."""
    return tuple(rate for _, rate in MATCHES) if isinstance(drafter, Lookup) else (0.5,)


def latest_sort(drafter: Drafter) -> int:
    """The sort of a drafter's latest guesses."""
    return drafter.sort if isinstance(drafter, Lookup) else 0


def _follows(text: "np.ndarray[Any, Any]") -> tuple[int, int]:
    """Index after the longest, then latest, earlier match of the text's end, and its length.

    The length is 0 where there is none, and otherwise within MIN_MATCH and MAX_MATCH.
    """
    size = len(text)
    matches = np.flatnonzero(text[:-1] == text[-1]) + 1
    for length in range(2, MAX_MATCH + 1):
        longer = matches[matches >= length]
        longer = longer[text[longer - length] == text[size - length]]
        if not len(longer):
            return (int(matches[-1]), length - 1) if length > MIN_MATCH else (0, 0)
        matches = longer
    return int(matches[-1]), MAX_MATCH


class DraftModel:
    """Drafts by a smaller model, whose cache is reused for prompts with a common prefix.

    `vocabulary`: the number of tokens that both models have.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._cache: list[Any] = make_prompt_cache(model)
        self._cached: list[int] = []  # the tokens in the cache
        self._trimmable_below = trimmable_below(self._cache)
        self._saved: tuple[int, list[Any]] | None = None  # a snapshot of so many tokens

    def propose(self, tokens: list[int], count: int, ahead: Sequence[int] = ()) -> list[int]:
        """Drafts nothing while it prefills a prompt, one chunk a call."""
        tokens = [*tokens, *ahead]
        self._roll_back_to(_common(self._cached, tokens, len(tokens) - 1))
        fresh = tokens[len(self._cached) :]
        if len(fresh) > DRAFT_CHUNK:
            self._run(fresh[:DRAFT_CHUNK])
            mx.eval([entry.state for entry in self._cache])
            return []
        draft_token = mx.argmax(self._run(fresh)[:, -1, :], axis=-1)
        self._saved = None
        if len(tokens) + count >= self._trimmable_below:
            self._saved = len(tokens), snapshot(self._cache)
        draft_tokens = [draft_token]
        for _ in range(count - 1):
            draft_token = mx.argmax(
                self._model(draft_token[None], cache=self._cache)[:, -1, :], axis=-1
            )
            draft_tokens.append(draft_token)
        drafted = cast(list[int], mx.concatenate(draft_tokens).tolist())
        self._cached += drafted[:-1]
        known = (index for index, token in enumerate(drafted) if token >= self._vocabulary)
        return drafted[: next(known, count)]

    def _run(self, tokens: list[int]) -> mx.array:
        logits: mx.array = self._model(mx.array([tokens]), cache=self._cache)
        self._cached += tokens
        return logits

    def _roll_back_to(self, count: int) -> None:
        """Rolls the cache back to the first `count` tokens, or fewer."""
        beyond = len(self._cached) - count
        if not beyond:
            return
        if len(self._cached) < self._trimmable_below:
            trim(self._cache, beyond)
        elif self._saved is not None and self._saved[0] <= count:
            count, saved = self._saved
            restore(self._cache, saved, len(self._cached) - count)
        else:
            count, self._cache = 0, make_prompt_cache(self._model)
        self._saved = None
        del self._cached[count:]


def _common(cached: list[int], tokens: list[int], most: int) -> int:
    """Length of the common prefix of both lists, at most `most`."""
    count = min(len(cached), most)
    if cached[:count] == tokens[:count]:
        return count
    pairs = zip(cached[:count], tokens[:count], strict=True)
    return next(index for index, (ours, theirs) in enumerate(pairs) if ours != theirs)
