"""mlx-lm's operations on a model and its caches, over stages of both engines."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from node.constraints import mask
from node.constraints.mask import Allowed, Filter
from node.generation.answer import Answer
from node.generation.batch import BatchDecoder
from node.generation.request import Job
from node.generation.sampling import Sampling
from node.generation.sequence import Sequence
from node.mlx.rollback import restore, snapshot
from node.pipeline.pipeline_model import PipelineModel
from tests.support.mixed import mixed
from tests.support.sampled import sampled
from tests.support.tiny import VOCAB, tiny_config, write_model
from tests.support.tiny_gguf import from_checkpoint
from unicluster.errors import InputError

PROMPT = [(7 * i * i + 3) % 200 + 1 for i in range(70)]


@dataclass
class Pair:
    """A float32 llama in one piece, and the same over three stages."""

    plain: Any
    split: Any
    head: str


RINGS = [
    ("mlx", "ggml", "mlx"),
    ("mlx", "mlx", "ggml"),
    ("mlx", "ggml", "ggml"),
    ("ggml", "mlx", "mlx"),
    ("ggml", "ggml", "mlx"),
    ("ggml", "mlx", "ggml"),
]


# Either engine is the stage before the other, is the head, and makes the logits.
SAMPLE = [("mlx", "mlx", "ggml"), ("ggml", "mlx", "ggml"), ("ggml", "ggml", "mlx")]


@pytest.fixture(scope="module", params=sampled(RINGS, SAMPLE), ids=", ".join)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("models")
    path = write_model(folder / "llama", tiny_config("llama"))
    file = from_checkpoint(path, folder / "llama.gguf")
    plain = mlx_lm.load(str(path))[0]
    with mixed(path, file, request.param) as split:
        yield Pair(plain, split, request.param[0])


def tokens(model: Any, prompt: list[int], **options: Any) -> list[int]:
    steps = generate_step(mx.array(prompt), model, **({"max_tokens": 20} | options))
    return [token for token, _ in steps]


def test_prompts_in_chunks(pair: Pair) -> None:
    options = {"max_tokens": 40, "prefill_step_size": 24}

    assert tokens(pair.split, PROMPT, **options) == tokens(pair.plain, PROMPT, **options)


def test_batches_that_prompts_of_unequal_length_join_and_leave(pair: Pair) -> None:
    def answers(model: Any) -> dict[int, list[int]]:
        batch = BatchGenerator(model, max_tokens=20, prefill_step_size=16)
        _, second, _ = batch.insert([PROMPT[:5], PROMPT[3:33], PROMPT[10:21]])
        found: dict[int, list[int]] = {}
        turn = 0
        while responses := batch.next_generated():
            for response in responses:
                found.setdefault(response.uid, []).append(response.token)
            turn += 1
            if turn == 5:
                batch.insert([PROMPT[2:50], PROMPT[:9]], max_tokens=[7, 25])
            if turn == 9:
                batch.remove([second])
        batch.close()
        return found

    assert answers(pair.split) == answers(pair.plain)


def test_a_cache_is_copied_and_trimmed(pair: Pair) -> None:
    def answers(model: Any) -> list[list[int]]:
        cache = make_prompt_cache(model)
        first = tokens(model, PROMPT[:20], prompt_cache=cache)
        twin = copy.deepcopy(cache)
        assert can_trim_prompt_cache(twin)
        trim_prompt_cache(twin, 12)
        return [first, *(tokens(model, [5, 6, 7], prompt_cache=each) for each in (cache, twin))]

    assert answers(pair.split) == answers(pair.plain)


def test_a_cache_is_run_ahead_and_taken_back(pair: Pair) -> None:
    def answers(model: Any) -> list[int]:
        cache = make_prompt_cache(model)
        tokens(model, PROMPT[:20], prompt_cache=cache, max_tokens=1)
        saved = snapshot(cache)
        mx.eval(model(mx.array([[1, 2, 3, 4]]), cache=cache)[:, -1])
        restore(cache, saved, 4)
        return tokens(model, [8], prompt_cache=cache)

    assert answers(pair.split) == answers(pair.plain)


def test_a_prompt_cache_is_saved_and_loaded(pair: Pair, tmp_path: Path) -> None:
    def answers(model: Any, file: str) -> list[int]:
        cache = make_prompt_cache(model)
        found = tokens(model, PROMPT, prompt_cache=cache)
        save_prompt_cache(file, cache)
        return found + tokens(model, [5, 6, 7], prompt_cache=load_prompt_cache(file))

    if pair.head == "ggml":
        with pytest.raises(InputError, match="can't be loaded into a head of ggml"):
            answers(pair.split, str(tmp_path / "split.safetensors"))
        return
    wanted = answers(pair.plain, str(tmp_path / "plain.safetensors"))
    assert answers(pair.split, str(tmp_path / "split.safetensors")) == wanted


def test_speculative_decoding(pair: Pair, tmp_path: Path) -> None:
    draft = mlx_lm.load(str(write_model(tmp_path, tiny_config("llama"), seed=3)))[0]

    def found(model: Any) -> list[tuple[int, bool]]:
        drafted = speculative_generate_step(mx.array(PROMPT), model, draft, max_tokens=30)
        return [(token, was_drafted) for token, _, was_drafted in drafted]

    assert found(pair.split) == found(pair.plain)


class Thirds(Filter):
    """Lets a third of the vocabulary pass, another one at each place."""

    def allowed(self, drafts: Any) -> int:
        return len(drafts)

    def _take(self, token: int) -> None:
        pass

    def _next_mask(self) -> Allowed:
        return (np.arange(self._vocabulary) + self.taken) % 3 == 0


def masked(model: Any, samplings: list[Sampling]) -> list[list[int]]:
    """20 tokens of each answer of one batch."""
    decoder, found = BatchDecoder(model), {}
    for number, sampling in enumerate(samplings):
        prompt = PROMPT[: 20 + number]
        job: Any = Job(prompt, 50, sampling, (), None, None, constraint=Thirds(len(prompt), VOCAB))
        job.constraint.follow([])
        ticket: Any = SimpleNamespace(job=job)
        sequence = Sequence(ticket, Answer.__new__(Answer), cache=make_prompt_cache(model))
        model(mx.array([prompt[:-1]]), cache=sequence.cache)
        sequence.cached = len(prompt) - 1
        decoder.add(sequence)
        found[sequence] = list[int]()
    while min(map(len, found.values())) < 20:
        for sequence, token, _ in decoder.step():
            found[sequence].append(token)
    for sequence in found:
        decoder.remove(sequence)
    decoder.close()
    return [tokens[:20] for tokens in found.values()]


def test_it_does_not_matter_where_tokens_of_a_mask_are_chosen(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask, "QUICK_S", float("inf"))  # however slow this machine is
    samplings = [Sampling(), Sampling(temperature=0.9, top_p=0.9, seed=3)]
    back = pair.split.trips.hops[-1]
    before = back.bytes
    there = masked(pair.split, samplings)
    fewer = back.bytes - before

    monkeypatch.setattr(PipelineModel, "chooses", False)
    before = back.bytes
    here = masked(pair.split, samplings)

    assert there == here
    if pair.head == "ggml":  # else the head makes the logits
        assert fewer < (back.bytes - before) / 2
    assert all((token + taken) % 3 == 0 for taken, token in enumerate(there[0], start=20))
