"""Decoder of a batch: answers that are decoded together."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from node.generation.sampling import TokenChooser
from node.generation.sequence import Sequence
from node.mlx.compat import decoding_rows, pending_choice
from node.mlx.compat_caches import can_merge, leaves


class Token(NamedTuple):
    """The next token of an answer, and the log-probabilities (vocabulary,) it was chosen by.

    Those are of no use where they were not asked for: the last stage may have chosen the token.
    """

    sequence: Sequence
    token: int
    logprobs: mx.array


class BatchDecoder:
    """Decodes any number of answers together, by mlx-lm's BatchGenerator."""

    def __init__(self, model: Any) -> None:
        self._numbers: dict[Sequence, int] = {}
        # Not mlx-lm's own stream: fibers switch in the middle of a step, and streams don't.
        stream = mx.default_stream(mx.default_device())
        self._chooses = bool(getattr(model, "chooses", False))
        self._choosers: dict[Sequence, TokenChooser] = {}
        self._masked: set[int] = set()  # sequences whose masks go with the step's frame
        self._generator: Any = BatchGenerator(
            _LookingAhead(model, self._choosers_of, self._look_ahead),
            completion_batch_size=2**16,
            stream=stream,
        )

    def add(self, sequence: Sequence) -> None:
        """Takes over a prefilled sequence."""
        sampler: Any = sequence.chooser.draw
        if self._chooses:
            sampler = self._choosers[sequence] = sequence.chooser
        (self._numbers[sequence],) = self._generator.insert(
            [sequence.prompt[sequence.cached :]],
            # The answer says when it is finished. mlx-lm would also extract its cache then.
            max_tokens=[sequence.job.max_tokens + 1],
            caches=[sequence.cache],
            all_tokens=[sequence.prompt[: sequence.cached]],
            samplers=[sampler],
            logits_processors=[sequence.processors],
        )
        sequence.cache = []

    def remove(self, sequence: Sequence) -> None:
        """Frees its cache."""
        self._choosers.pop(sequence, None)
        self._generator.remove([self._numbers.pop(sequence)])

    def take(self, sequence: Sequence) -> tuple[list[int], list[Any]]:
        """Removes a sequence; returns the tokens in its cache, answer included, and the cache."""
        number = self._numbers.pop(sequence)
        self._choosers.pop(sequence, None)
        taken = self._generator.remove([number], return_prompt_caches=True)
        cache, tokens = taken[number]
        return list(tokens), cache

    def hand_over(self, sequence: Sequence) -> list[Token]:
        """Removes a sequence for another decoder; returns its token that is chosen already."""
        pending = pending_choice(self._generator, self._numbers[sequence])
        tokens, cache = self.take(sequence)
        if pending is None:
            sequence.hand_over(sequence.prompt, cache, len(tokens))
            return []
        token, logprobs = pending
        sequence.hand_over([*tokens, token], cache, len(tokens))
        return [Token(sequence, token, logprobs)]

    def step(self) -> list[Token]:
        """Decodes at most one token an answer; one that was just added gets none yet."""
        by_number = {number: sequence for sequence, number in self._numbers.items()}
        _, responses = self._generator.next()
        return [Token(by_number[r.uid], r.token, r.logprobs) for r in responses]

    def _choosers_of(self, tokens: mx.array, cache: Any) -> list[TokenChooser]:
        """Choosers of a decode step's rows; none in an answer's first step.

        The masks that go along are made of its tokens (batch, 1).
        """
        self._masked.clear()
        if not self._chooses:
            return []
        by_number = {number: sequence for sequence, number in self._numbers.items()}
        rows = decoding_rows(self._generator, cache)
        choosers = [self._choosers[by_number[number]] for number in rows]
        if any(chooser.wants_mask for chooser in choosers):
            newest: Any = tokens[:, -1].tolist()
            for number, chooser, token in zip(rows, choosers, newest, strict=True):
                if chooser.wants_mask:
                    self._masked.add(number)
                    for each in by_number[number].job.filters:
                        each.follow([token])
                    chooser.mask_next()
        return choosers

    def _look_ahead(self, tokens: mx.array, cache: Any) -> None:
        """Makes the other masks of filtered answers while logits are computed.

        tokens: (batch, 1). An answer's first token needs none: its mask is there already.
        """
        filters = {
            number: sequence.job.filters
            for sequence, number in self._numbers.items()
            if sequence.job.filters and number not in self._masked
        }
        rows = decoding_rows(self._generator, cache) if filters else ()
        newest: Any = tokens[:, -1].tolist() if rows else []
        for number, token in zip(rows, newest, strict=True):
            for each in filters.get(number, ()):
                each.follow([token])

    def close(self) -> None:
        """Gives back the memory limit that mlx-lm has raised."""
        self._generator.close()


class _LookingAhead:
    """A model whose steps have the choosers of their cache's rows.

    It calls `meanwhile` with its input and cache once its step has begun.
    """

    def __init__(
        self,
        model: Any,
        choosers_of: Callable[[mx.array, Any], list[TokenChooser]],
        meanwhile: Callable[[mx.array, Any], None],
    ) -> None:
        self._model = model
        self._choosers_of = choosers_of
        self._meanwhile = meanwhile

    def __call__(self, inputs: mx.array, cache: Any = None) -> Any:
        choosers = self._choosers_of(inputs, cache)
        more = {"choosers": choosers} if choosers else {}
        logits = self._model(inputs, cache=cache, **more)
        self._meanwhile(inputs, cache)
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def can_batch(caches: Iterable[Any]) -> bool:
    """Whether answers with such caches can be decoded together."""
    return all(map(can_merge, leaves(caches)))
