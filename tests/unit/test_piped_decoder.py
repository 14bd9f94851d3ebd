"""The decoder that guesses through the pipe, over a model whose choices are made elsewhere."""

from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import pytest

from node.generation.config import GenerationConfig
from node.generation.piped import PipedDecoder
from node.generation.sampling import Sampling, TokenChooser
from node.generation.sequence import Sequence
from node.speculation.depth import PipeTimes
from node.speculation.drafting import Speculation

VOCABULARY = 32
LENGTH = 60


class Model:
    """Logits (1, tokens, vocabulary) that go by each token alone; choosers are asked at once."""

    chooses = True
    copies_states = True

    def __init__(self) -> None:
        self.widest = 0

    def __call__(
        self, inputs: mx.array, cache: list[Any], choosers: list[TokenChooser]
    ) -> mx.array:
        self.widest = max(self.widest, inputs.shape[1])
        for chooser in choosers:
            chooser.ask(VOCABULARY)
        for chooser in choosers:
            chooser.settle(None)
        table = mx.random.normal((VOCABULARY, VOCABULARY), key=mx.random.key(3))
        return table[inputs]

    def pipe_times(self, _: float) -> PipeTimes:
        return PipeTimes((1.0, 1.0, 1.0), growth=0.0)

    def cancel(self, frames: Any) -> None:
        pass


class Drafter:
    """The text to come, but for every so many-th token."""

    def __init__(self, text: list[int], wrong: int) -> None:
        self._text, self._wrong = text, wrong

    def propose(self, tokens: list[int], count: int, ahead: Any = ()) -> list[int]:
        at = len(tokens) + len(ahead)
        text = self._text[at : at + count]
        return [
            (token + 1) % VOCABULARY if (at + i) % self._wrong == 0 else token
            for i, token in enumerate(text)
        ]


def decoded(text: list[int], wrong: int, sampling: Sampling) -> tuple[list[int], int]:
    """A text of LENGTH tokens, and how many tokens the widest frame had."""
    speculation = Speculation(lambda: Drafter(text, wrong), 4, piped=True)
    config = cast(GenerationConfig, SimpleNamespace(speculation=speculation))
    model = Model()
    decoder = PipedDecoder(model, [], config, (), lambda frames: frames)
    chooser = sampling.chooser(needs_logits=True)
    answer = SimpleNamespace(count_drafted=lambda drafted, accepted: None, timeline=None)
    sequence = SimpleNamespace(
        prompt=[1, 2], cached=1, cache=[], processors=[], chooser=chooser, answer=answer
    )
    sequence.job = SimpleNamespace(filters=[])
    sequence.ticket = SimpleNamespace(ended=False)
    sequence.most = LENGTH
    decoder.add(cast(Sequence, sequence))
    tokens = [1, 2]
    while len(tokens) < LENGTH:
        tokens += [token.token for token in decoder.step()]
    return tokens, model.widest


@pytest.mark.parametrize("wrong", [2, 3, 5, 7])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_wrong_guesses_in_wide_frames_cost_no_random_numbers(
    wrong: int, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, seed=5)
    plain, _ = decoded([], 1, sampling)
    text, widest = decoded(plain, wrong, sampling)
    assert widest > 1
    assert text == plain
