"""Sampling fields: their ranges, a model's own defaults, and mlx-lm's functions for them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import (
    make_frequency_penalty,
    make_logits_processors,
    make_presence_penalty,
    make_sampler,
)

from node.constraints.mask import Filter, packed_mask
from node.mlx.compat import draws_one_number, number_drawn, uncompiled
from node.ring.choices import GREEDY_BELOW
from unicluster.errors import InputError
from unicluster.v1 import chat_pb2
from unicluster.v1.stage_pb2 import Choice

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

# Of PCG64, for one seed of a token: its range is half that of a step, so none is drawn again.
STEPS_PER_SEED = 1
# Of penalties: of the tokens that they get they look at this many, the last ones.
WHOLE = 1 << 31


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Temperature 0 is greedy; raises InputError naming an invalid field."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 2)
        _check("top_p", self.top_p, 0, 1, above=True)
        _check("min_p", self.min_p, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, 0, 10, above=True)
        _check("presence_penalty", self.presence_penalty, -2, 2)
        _check("frequency_penalty", self.frequency_penalty, -2, 2)

    @classmethod
    def of_model(cls, generation_config: Mapping[str, Any]) -> "Sampling":
        """The defaults in a model's generation_config.json, read as transformers reads them."""
        known = {f.name for f in fields(cls)} - {"seed", "logit_bias"}
        values = {k: v for k, v in generation_config.items() if k in known and v is not None}
        if generation_config.get("do_sample"):
            values.setdefault("temperature", 1.0)
        elif "do_sample" in generation_config:
            values["temperature"] = 0.0
        try:
            return cls(**values)
        except (InputError, TypeError) as error:
            raise InputError(f"generation_config.json: {error}") from None

    def updated(self, sampling: chat_pb2.Sampling) -> "Sampling":
        """A copy in which the fields that are set in `sampling` replace the defaults."""
        values = {known.name: value for known, value in sampling.ListFields()}
        if "logit_bias" in values:
            values["logit_bias"] = dict(sampling.logit_bias)
        return replace(self, **values)

    def sampler(self, drawn: int = 0) -> "Draw | None":
        """Log-probabilities (1, vocabulary) to a token (1,); None when greedy.

        `drawn` tokens of the answer have been sampled before, by another one.

        None and not a function of its own, so that a batch's greedy rows are taken in one go.
        """
        return None if self.temperature < GREEDY_BELOW else Draw(self, drawn)

    def chooser(
        self, needs_logits: bool, drawn: int = 0, filters: Sequence[Filter] = ()
    ) -> "TokenChooser":
        """A sampler whose tokens the last stage may choose, unless they need all logits here.

        `drawn`: as of `sampler`. `filters`: those that the tokens have to pass.
        """
        return TokenChooser(self, needs_logits, self.sampler(drawn), filters)

    def processors(self, prompt_tokens: int) -> list[LogitsProcessor]:
        """The bias, then penalties: the repetition's over mlx-lm's window of recent tokens, prompt
        included, the others' over the whole answer so far, as OpenAI's document has them.

        prompt_tokens: how many of a sequence's tokens, from the first, are not of its answer.
        """
        repetition = None if self.repetition_penalty == 1 else self.repetition_penalty
        processors: list[LogitsProcessor] = make_logits_processors(
            logit_bias=dict(self.logit_bias) or None,
            repetition_penalty=repetition,
        )
        if self.presence_penalty:
            penalty = make_presence_penalty(self.presence_penalty, WHOLE)
            processors.append(_of_answer(penalty, prompt_tokens))
        if self.frequency_penalty:
            penalty = make_frequency_penalty(self.frequency_penalty, WHOLE)
            processors.append(_of_answer(penalty, prompt_tokens))
        return processors


class Draw:
    """Samples with randomness of its own, so that nothing depends on who else is in the batch.

    MLX's random state can be set but not swapped: each token gets a seed from the request's.
    """

    def __init__(self, sampling: Sampling, drawn: int) -> None:
        self._sampling = sampling
        self._seeds = np.random.Generator(
            np.random.PCG64(sampling.seed).advance(drawn * STEPS_PER_SEED)
        )
        self._returned: list[int] = []  # seeds of tokens that came to nothing, the next one last
        self._sampler: Sampler | None = None

    def __call__(self, logprobs: mx.array) -> mx.array:
        return self.drawn(logprobs, self.next_seed())

    def next_seed(self) -> int:
        """The seed of the next token."""
        return self._returned.pop() if self._returned else int(self._seeds.integers(2**63))

    def take_back(self, seed: int) -> None:
        """Undoes the latest `next_seed`: its token came to nothing."""
        self._returned.append(seed)

    def drawn(self, logprobs: mx.array, seed: int) -> mx.array:
        """The token (1,) of log-probabilities (1, vocabulary) by a seed."""
        if self._sampler is None:
            self._sampler = self._make(logprobs.shape[-1])
        mx.random.seed(seed)
        with uncompiled():
            return self._sampler(logprobs)

    def _make(self, vocabulary: int) -> Sampler:
        sampling = self._sampling
        sampler: Sampler = make_sampler(
            temp=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            # mlx-lm raises when the k most likely tokens are all tokens.
            top_k=sampling.top_k if sampling.top_k < vocabulary else 0,
        )
        return sampler


class TokenChooser:
    """A sampler of log-probabilities (1, vocabulary) to tokens (1,), and a Chooser.

    Whether the last stage chooses a token or this does, it is the same one. `draw`: None when
    greedy. With `filters` the last stage may choose a token whose mask goes along.
    """

    def __init__(
        self,
        sampling: Sampling,
        needs_logits: bool,
        draw: Draw | None,
        filters: Sequence[Filter] = (),
    ) -> None:
        self.draw = draw
        self._filters = filters
        self._masks = False  # whether the filters have taken in all before the next token
        self._sampling = sampling
        self._needs_logits = needs_logits
        self._all = needs_logits or not (draw is None or draws_one_number())
        self._seed: int | None = None  # of the token that was asked for
        self._token: int | None = None

    def ahead(self) -> "TokenChooser":
        """A chooser of the token after all that were asked for, while those are on their way."""
        return TokenChooser(self._sampling, self._needs_logits, self.draw, self._filters)

    @property
    def wants_mask(self) -> bool:
        """Whether it is worth it to make the next token's mask before the frame is sent."""
        return bool(self._filters) and not self._all and all(f.is_quick for f in self._filters)

    @property
    def is_settled(self) -> bool:
        """Whether the next token was chosen elsewhere."""
        return self._token is not None

    def mask_next(self) -> None:
        """Has the next `ask` send the filters' mask: they have taken in all tokens before."""
        self._masks = True

    def take_back(self) -> None:
        """Undoes `ask`, of the latest first: the token came to nothing, and is chosen again."""
        if self._seed is not None and self.draw is not None:
            self.draw.take_back(self._seed)
        self._seed = self._token = None

    def ask(self, vocabulary: int) -> Choice:
        self._token = None
        masks, self._masks = self._masks, False
        needs_all, allowed = self._all or bool(self._filters), b""
        if masks and not self._all:
            mask = packed_mask(self._filters, vocabulary)
            needs_all, allowed = mask is not None, mask or b""
        if self.draw is None:
            return Choice(all=needs_all, allowed=allowed)
        self._seed = self.draw.next_seed()
        if needs_all and not allowed:
            return Choice(all=True)
        sampling = self._sampling
        return Choice(
            all=needs_all,
            allowed=allowed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            top_k=sampling.top_k,
            draw=number_drawn(self._seed),
        )

    def settle(self, token: int | None) -> None:
        self._token = token

    def __call__(self, logprobs: mx.array) -> mx.array:
        token, self._token = self._token, None
        seed, self._seed = self._seed, None
        if token is not None:
            return mx.array([token], mx.uint32)
        if self.draw is None:
            return mx.argmax(logprobs, axis=-1)
        return self.draw.drawn(logprobs, self.draw.next_seed() if seed is None else seed)


def _of_answer(penalty: LogitsProcessor, prompt_tokens: int) -> LogitsProcessor:
    """A penalty that sees the tokens behind the first `prompt_tokens`."""

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        return penalty(tokens[prompt_tokens:], logits)

    return processor


def _check(field: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    if not low <= value <= high or (above and value == low):
        wanted = f"above {low} and at most {high}" if above else f"between {low} and {high}"
        raise InputError(f"{field}: must be {wanted}, got {value:g}")
