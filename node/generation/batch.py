"""Decoder of a batch: answers that are decoded together."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from node.generation.sequence import Sequence
from node.mlx.compat_caches import can_merge, leaves


class Token(NamedTuple):
    """The next token of an answer, and the log-probabilities (vocabulary,) it was chosen by."""

    sequence: Sequence
    token: int
    logprobs: mx.array


class BatchDecoder:
    """Decodes any number of answers together, by mlx-lm's BatchGenerator."""

    def __init__(self, model: Any) -> None:
        self._numbers: dict[Sequence, int] = {}
        # Not mlx-lm's own stream: fibers switch in the middle of a step, and streams don't.
        stream = mx.default_stream(mx.default_device())
        self._generator: Any = BatchGenerator(model, completion_batch_size=2**16, stream=stream)

    def add(self, sequence: Sequence) -> None:
        """Takes over a prefilled sequence."""
        sampling = sequence.job.sampling
        (self._numbers[sequence],) = self._generator.insert(
            [sequence.prompt[-1:]],
            # The answer says when it is finished. mlx-lm would also extract its cache then.
            max_tokens=[sequence.job.max_tokens + 1],
            caches=[sequence.cache],
            all_tokens=[sequence.prompt[:-1]],
            samplers=[sampling.sampler()],
            logits_processors=[sampling.processors()],
        )
        sequence.cache = []

    def remove(self, sequence: Sequence) -> None:
        """Frees its cache."""
        self._generator.remove([self._numbers.pop(sequence)])

    def take(self, sequence: Sequence) -> tuple[list[int], list[Any]]:
        """Removes a sequence; returns the tokens in its cache, answer included, and the cache."""
        number = self._numbers.pop(sequence)
        taken = self._generator.remove([number], return_prompt_caches=True)
        cache, tokens = taken[number]
        return list(tokens), cache

    def step(self) -> list[Token]:
        """Decodes at most one token an answer; one that was just added gets none yet."""
        by_number = {number: sequence for sequence, number in self._numbers.items()}
        _, responses = self._generator.next()
        return [Token(by_number[r.uid], r.token, r.logprobs) for r in responses]

    def close(self) -> None:
        """Gives back the memory limit that mlx-lm has raised."""
        self._generator.close()


def can_batch(caches: Iterable[Any]) -> bool:
    """Whether answers with such caches can be decoded together."""
    return all(map(can_merge, leaves(caches)))
