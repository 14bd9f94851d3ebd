"""A decoder of one answer at a time: for caches that can't be batched, and for guessing ahead."""

from collections.abc import Collection
from typing import Any

import mlx.core as mx

from node.generation.batch import Token
from node.generation.config import GenerationConfig
from node.generation.sequence import Sequence
from node.mlx.kv_quant import quantize
from node.mlx.rollback import cut, cuttable_below, restore, snapshot
from node.pipeline.pipeline_model import PUSHED_TOKENS

# Guessed ahead at first.
FIRST_AHEAD = 4


class _Run:
    """An answer being made. `tokens` are the prompt and the answer, `held` of them in the cache.

    `ahead` is how many tokens are worth guessing.
    """

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.tokens = list(sequence.prompt)
        self.held = len(self.tokens) - 1
        self.ahead = FIRST_AHEAD
        self._seen = mx.array(self.tokens)
        self._sampler = sequence.job.sampling.sampler() or _greedy
        self._processors = sequence.job.sampling.processors()

    @property
    def room(self) -> int:
        """Tokens that may be guessed: after them there is always one that the model chooses."""
        return self.sequence.most - len(self.tokens) - 1

    def choose(self, logits: mx.array) -> Token:
        """The next token, by logits (1, vocabulary); one by one, as if nothing was guessed."""
        for processor in self._processors:
            logits = processor(self._seen, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        drawn: Any = self._sampler(logprobs)
        if self._processors:
            self._seen = mx.concatenate([self._seen, drawn])
        token = drawn.item()
        self.tokens.append(token)
        return Token(self.sequence, token, logprobs[0])


class Solo:
    """One answer at a time, by a loop of our own; several tokens a step if guesses are right.

    A guess counts only if it is the token that the model chooses in that place: greedy or drawn,
    the answer is the one there would be without. `kinds` are fresh caches of all layers. Tokens
    in `ends` are never guessed.
    """

    def __init__(
        self,
        model: Any,
        kinds: list[Any],
        config: GenerationConfig,
        ends: Collection[int] = (),
    ) -> None:
        speculation = config.speculation
        self._model = model
        self._cuttable_below = cuttable_below(kinds)
        self._kv_bits = config.spec.kv_bits
        self._drafter = speculation.drafter() if speculation is not None else None
        self._most = speculation.most if speculation is not None else 0
        self._ends = ends
        self._run: _Run | None = None

    def add(self, sequence: Sequence) -> None:
        """Takes over a prefilled sequence; there must be no other."""
        self._run = _Run(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Frees its cache."""
        sequence.cache = []
        self._run = None

    def take(self, sequence: Sequence) -> tuple[list[int], list[Any]]:
        """Removes it; returns its cache and the tokens in it, those of the answer included."""
        run, cache = self._run, sequence.cache
        self.remove(sequence)
        return ([], cache) if run is None else (run.tokens[: run.held], cache)

    def step(self) -> list[Token]:
        """One token, and before it those that were guessed right."""
        run = self._run
        if run is None:
            return []
        cache = run.sequence.cache
        fresh = run.tokens[run.held :]
        guesses = self._guess(run, most=PUSHED_TOKENS - len(fresh))
        fed = len(fresh) + len(guesses)
        saved = None
        if guesses and run.held + fed >= self._cuttable_below:
            saved = snapshot(cache)
        logits = self._model(mx.array([fresh + guesses]), cache=cache)[:, len(fresh) - 1 :, :]
        quantize(cache, self._kv_bits)
        chosen = [run.choose(logits[:, 0, :])]
        for index, guess in enumerate(guesses, start=1):
            if chosen[-1].token != guess:
                break
            chosen.append(run.choose(logits[:, index, :]))
        right = len(chosen) - 1
        self._count(run, len(guesses), right)
        if saved is not None and right < len(guesses):
            restore(cache, saved, fed)  # what was right of it is fed again with the next guesses
        else:
            run.held += len(fresh) + right
            if right < len(guesses):
                cut(cache, len(guesses) - right)
        return chosen

    def close(self) -> None:
        self._run = None

    def _guess(self, run: _Run, most: int) -> list[int]:
        count = min(run.ahead, self._most, run.room, most)
        if self._drafter is None or count < 1:
            return []
        guesses = self._drafter.propose(run.tokens, count)
        end = next((i for i, guess in enumerate(guesses) if guess in self._ends), len(guesses))
        return guesses[:end]

    def _count(self, run: _Run, drafted: int, accepted: int) -> None:
        if not drafted:
            return
        # As long as all are right try more, and after a wrong one hardly more than were right.
        run.ahead = run.ahead + 2 if accepted == drafted else accepted + 1
        run.ahead = min(run.ahead, self._most)
        run.sequence.answer.guessed(drafted, accepted)


def _greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)
