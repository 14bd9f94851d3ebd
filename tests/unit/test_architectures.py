"""Any architecture of mlx-lm, cut into stages, gives the unsplit model's logits."""

import sys
import types
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import make_prompt_cache

from node.mlx.hollow import HollowModel
from tests.support import sweep, zoo
from tests.support.sampled import sampled
from tests.support.wire import over_the_wire
from unicluster.errors import StageError

TOLD = sweep.verdicts_in_table()


@pytest.mark.parametrize("name", sampled(zoo.names(), sweep.representatives()))
def test_every_cut_gives_the_unsplit_logits(name: str) -> None:
    """A sweep takes a minute and a half: some 130 models, built anew for each stage."""
    verdict = sweep.judge(name)

    if verdict is None:
        pytest.skip("what models share, no model")
    assert not verdict.differs
    assert name in TOLD, "run python -m tests.support.sweep --table"
    if verdict.skipped:
        pytest.skip(f"mlx-lm can't run it here: {verdict.skipped}")
    assert TOLD[name] in (verdict.word, "skipped"), "run python -m tests.support.sweep --table"


@pytest.mark.parametrize("name", ["iquestloopcoder", "nanbeige: loops"])
def test_loops_are_refused_by_name(name: str) -> None:
    with pytest.raises(StageError, match=r"layers don't run once each and in order"):
        HollowModel(zoo.build(name), name, 0, 2)


@pytest.mark.parametrize(
    ("name", "said"), [("qwen3", "always"), ("gemma3", "until full"), ("qwen3_next", "never")]
)
def test_whether_caches_can_be_trimmed_is_known(name: str, said: str) -> None:
    model = zoo.build(name)
    stage = HollowModel(zoo.build(name), name, 2, 4)
    whole, cut = make_prompt_cache(model), stage.cache_view.make()
    hidden = mx.zeros((1, zoo.WINDOW + 1, 64))

    before = [entry.is_trimmable() for entry in cut]
    model(sweep.TOKENS[:, : zoo.WINDOW + 1], cache=whole)
    stage.forward(hidden, cut)

    trimmable = {"always": [True, True], "until full": [True, False], "never": [False, False]}
    assert [all(before), all(entry.is_trimmable() for entry in cut)] == trimmable[said]
    assert all(e.is_trimmable() for e in cut) == all(e.is_trimmable() for e in whole)


# --- an architecture that no one has seen before


class MadeUpLayer(nn.Module):
    def __init__(self, args: Any, secret: types.SimpleNamespace) -> None:
        super().__init__()
        self.heads = args.heads
        self.secret = secret if args.secretive else None
        self.project = nn.Linear(args.dims, 3 * args.dims)
        self.out = nn.Linear(args.dims, args.dims)

    def __call__(self, x: mx.array, words: mx.array, mask: Any, cache: Any) -> mx.array:
        shape = (*x.shape[:2], self.heads, -1)
        parts = mx.split(self.project(x), 3, axis=-1)
        q, k, v = (part.reshape(shape).transpose(0, 2, 1, 3) for part in parts)
        k, v = cache.update_and_fetch(k, v)
        if self.secret is not None:
            v, self.secret.value = v + self.secret.value, v[:, :, -1:]
        attended = scaled_dot_product_attention(q, k, v, cache=cache, scale=0.25, mask=mask)
        return x + self.out(attended.transpose(0, 2, 1, 3).reshape(x.shape)) + 0.1 * words


@dataclass
class MadeUpArgs:
    """Names its sizes as it likes."""

    dims: int = 64
    heads: int = 4
    depth: int = 4
    secretive: bool = False

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "MadeUpArgs":
        return cls()


class MadeUp(nn.Module):
    """Later layers see the words again, the first layer's result, and the first cache."""

    def __init__(self, args: MadeUpArgs) -> None:
        super().__init__()
        self.args = args
        self.words = nn.Embedding(zoo.VOCAB, args.dims)
        secret = types.SimpleNamespace(value=0)
        self.stack = [MadeUpLayer(args, secret) for _ in range(args.depth)]
        self.norm = nn.RMSNorm(args.dims)

    @property
    def layers(self) -> list[nn.Module]:
        return self.stack

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        hidden = words = self.words(tokens)
        mask = create_attention_mask(hidden, cache[0])
        results: list[mx.array] = []
        for layer, entry in zip(self.stack, cache, strict=True):
            seen = self.norm(words) + sum(results[:1])
            hidden = layer(hidden, seen, mask, entry)
            results.append(hidden)
            if len(results) == 3:
                hidden = hidden + cache[0].state[0].mean()
        return self.words.as_linear(self.norm(hidden))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("mlx_lm.models.made_up")
    module.Model, module.ModelArgs = MadeUp, MadeUpArgs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return "made_up"


def test_a_new_architecture_needs_no_change_here(made_up: str) -> None:
    verdict = sweep.judge(made_up)

    assert verdict is not None
    assert (verdict.word, verdict.refused, verdict.splits) == ("identical", "", 5)


def test_layers_that_pass_things_behind_the_model_s_back_are_refused() -> None:
    model = MadeUp(MadeUpArgs(secretive=True))

    with pytest.raises(StageError, match="later layers read an inner value of layer 1"):
        HollowModel(model, "made_up", 0, 2)


# --- batches through mlx-lm's own generator


class Chain:
    """Stages in this process, behind the interface of one mlx-lm model."""

    def __init__(self, name: str, bounds: tuple[int, ...]) -> None:
        self.stages = [HollowModel(zoo.build(name), name, *ends) for ends in pairwise(bounds)]
        self._sizes = [len(stage.cache_view) for stage in self.stages]
        self.layers = list(range(sum(self._sizes)))

    def make_cache(self) -> list[Any]:
        return [entry for stage in self.stages for entry in stage.cache_view.make()]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        entries = iter(cache)
        parts = [[next(entries) for _ in range(size)] for size in self._sizes]
        out, extra = self.stages[0].front(tokens, parts[0])
        mx.eval(extra)
        for stage, part in zip(self.stages[1:], parts[1:], strict=True):
            out, extra = stage.forward(over_the_wire(out), part)
            mx.eval(extra)
        return self.stages[0].final_logits(tokens, over_the_wire(out), parts[0])


PROMPTS = [[5, 9, 2, 7, 3, 1, 8, 4, 6, 11, 13], [21, 3], [8, 8, 31, 40, 2, 17, 5]]


def batched(model: Any) -> list[tuple[int, int, list[float]]]:
    """Three prompts of unequal lengths, of which the last joins later and the first leaves."""
    generator = BatchGenerator(model, max_tokens=9, prefill_step_size=4)
    generator.insert(PROMPTS[:2], max_tokens=[6, 12])
    computed = []
    for step in range(40):
        if step == 4:
            generator.insert(PROMPTS[2:])
        _, responses = generator.next()
        computed += [(r.uid, r.token, r.logprobs[:8].tolist()) for r in responses]
    return computed


@pytest.mark.parametrize(
    "name",
    [
        "qwen3",  # KV
        "gemma3",  # rotating and KV
        "deepseek_v3",  # MLA
        "mamba2",  # state space
        "qwen3_next",  # linear attention and KV
        "falcon_h1",  # both in one layer
        "gemma4",  # copies of earlier layers' caches
    ],
)
def test_batches_give_the_unsplit_answers(name: str) -> None:
    bounds = (0, 1, 4, 6) if name == "gemma4" else (0, 1, 3, 4)

    computed = batched(Chain(name, bounds))

    assert len(computed) == 6 + 12 + 9
    assert computed == batched(zoo.build(name))


@pytest.mark.parametrize("name", ["llama4", "deepseek_v41: shared index"])
def test_caches_that_mlx_lm_cannot_merge_still_take_prompts_of_one_length(name: str) -> None:
    """mlx-lm's own generator refuses chunked caches, and so does a stage's."""
    chain, whole = Chain(name, (0, 1, 3, 4)), zoo.build(name)
    tokens = mx.concatenate([sweep.TOKENS, sweep.TOKENS[:, ::-1]])
    caches = chain.make_cache(), whole.make_cache()

    for first, end in pairwise((0, 7, 12, *range(13, 21))):
        computed, wanted = (
            model(tokens[:, first:end], cache=cache)
            for model, cache in zip((chain, whole), caches, strict=True)
        )
        assert mx.array_equal(computed, wanted)
    with pytest.raises(ValueError, match="does not yet support batching"):
        batched(whole)
