"""Contracts with what is not documented of MLX and mlx-lm, a test a piece.

One that fails after an upgrade names the piece: see node/mlx/compat.py, compat_caches.py and the
bounds in pyproject.toml. Others: test_ggml_compat.py, test_hub_compat.py.
"""

import ast
import copy
import glob
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, TextStateMachine
from mlx_lm.models import llama
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
)

from node.mlx import cache_view, compat, compat_caches
from node.mlx.saved.state import cache_from_state
from node.pipeline.pending_logits import PendingLogits
from node.prefixes.saved import SavedArray
from tests.support import zoo

HEADS, SIZE = 2, 64

KV_KINDS: dict[str, Callable[[], Any]] = {
    "KVCache": KVCache,
    "ConcatenateKVCache": ConcatenateKVCache,
    "QuantizedKVCache": QuantizedKVCache,
    "RotatingKVCache": lambda: RotatingKVCache(8),
    "ChunkedKVCache": lambda: ChunkedKVCache(8),
    "BatchKVCache": lambda: BatchKVCache([0]),
    "BatchRotatingKVCache": lambda: BatchRotatingKVCache(8, [0]),
}


def update(cache: Any, tokens: int) -> Any:
    keys = mx.random.normal((1, HEADS, tokens, SIZE))
    return cache.update_and_fetch(keys, 2 * keys)


def arrays_of(state: Any) -> list[mx.array]:
    return [part for _, part in tree_flatten(state) if isinstance(part, mx.array)]


# --- models


def test_the_classes_of_a_config() -> None:
    found, arguments = compat.model_classes({"model_type": "llama"})
    assert (found, arguments) == (llama.Model, llama.ModelArgs), (
        "mlx_lm.utils._get_classes no longer returns (Model, ModelArgs) of a config"
    )
    mistral, _ = compat.model_classes({"model_type": "mistral"})
    assert mistral is llama.Model, "mlx_lm.utils._get_classes no longer maps model types"
    with pytest.raises(ValueError, match=r"^mlx-lm [\d.]+ has no model type no such thing: "):
        compat.model_classes({"model_type": "no such thing"})


def test_a_module_has_its_arrays_as_items() -> None:
    inner = nn.Linear(2, 3)
    module = nn.Sequential(inner)
    assert [name for name, _ in compat.direct_arrays(inner)] == ["weight", "bias"]
    assert compat.direct_arrays(module) == [], "nn.Module.items: submodules' arrays among them"

    compat.set_array(inner, "bias", mx.ones(3))
    compat.set_array(inner, "weight", mx.zeros((3, 2)))
    assert module(mx.ones((1, 2))).tolist() == [[1, 1, 1]], (
        "nn.Module.__setitem__: a module computes with other arrays than its items"
    )
    compat.drop_array(inner, "weight")
    assert [name for name, _ in tree_flatten(module.parameters())] == ["layers.0.bias"], (
        "nn.Module.__delitem__ no longer removes a parameter"
    )


def test_one_module_gets_another_call() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(first, second)
    base = type(first)

    compat.override(first, __call__=lambda self, x: self.weight * 0 + 7)

    assert first(mx.ones((1, 2))).tolist() == [[7, 7], [7, 7]], (
        "the class of one nn.Module can no longer be replaced by a subclass"
    )
    assert isinstance(first, nn.Linear)
    assert type(first).__name__ == "Linear"
    assert model.layers[0] is first
    assert type(second) is base
    compat.restore_class(first, base)
    assert first(mx.ones((1, 2))).shape == (1, 2)


def test_gathers_by_foreign_rows_stay_within_their_array() -> None:
    model = zoo.build("deepseek_v41: shared index")
    module = sys.modules[type(model).__module__]
    values = mx.random.normal((2, 3, 4))
    chosen = mx.array([[[0, 2, -1]], [[1, 0, 2]]])
    plain = module._gather_rows(values, chosen)

    compat.bound_gathers(model)
    compat.bound_gathers(model)

    gather = module._gather_rows
    assert mx.array_equal(gather(values, chosen), plain)
    assert mx.array_equal(gather(values, mx.full((2, 1, 3), 2**30)), gather(values, chosen * 0 + 2))
    assert mx.array_equal(gather(values[:, :0], chosen), mx.zeros((2, 1, 3, 4)))


# --- the lazy graph


def test_the_lazy_graph_names_what_an_array_is_computed_from() -> None:
    before = {"left": compat.marked(mx.ones(3)), "right": compat.marked(mx.ones(3))}
    after = compat.marked(before["left"] + before["right"])

    edges = [
        part
        for part in compat.lazy_graph(before | {"after": after})
        if isinstance(part, compat.Edge)
    ]
    reached = {"after"}
    for edge in reversed(edges):
        if edge.after in reached:
            reached.add(edge.before)
    # One pass over edges in their order is enough only where inputs come first.
    assert {"left", "right"} <= reached, (
        "mx.export_to_dot: its text no longer leads from an array to its inputs"
    )


def test_a_compiled_function_is_announced_each_time_it_runs() -> None:
    squared = mx.compile(lambda x: mx.exp(x) * x)
    first, second = compat.marked(mx.ones(3)), compat.marked(mx.ones(3))
    arrays = {
        "first": first,
        "second": second,
        "from first": compat.marked(squared(first)),
        "from second": compat.marked(squared(second)),
    }
    inputs: dict[str, set[str]] = {}
    for part in compat.lazy_graph(arrays):
        if isinstance(part, compat.Node):
            inputs.pop(part.name, None)
        else:
            known = {part.before} if part.before in ("first", "second") else set()
            inputs.setdefault(part.after, set()).update(known | inputs.get(part.before, set()))
    assert inputs["from first"] == {"first"}, "mx.export_to_dot: compiled functions run together"
    assert inputs["from second"] == {"second"}, "mx.export_to_dot: compiled functions run together"


def test_an_evaluated_array_has_no_graph() -> None:
    array = mx.ones(3) + 1
    assert not compat.is_evaluated(array), "mx.export_to_dot: no edges of an unevaluated array"
    mx.eval(array)
    assert compat.is_evaluated(array), "mx.export_to_dot: edges of an evaluated array"


def test_a_marked_array_is_another_one_with_the_same_values() -> None:
    array = mx.arange(3)
    other = compat.marked(array)
    assert other is not array, "mx.stop_gradient returns the array itself"
    assert other.tolist() == [0, 1, 2]


# --- memory


def test_a_separate_array_does_not_change_with_the_first() -> None:
    array = mx.zeros(4)
    other = compat.separate(array)
    array[1:3] = mx.ones(2)
    other[0:1] = mx.full((1,), 5)
    assert (array.tolist(), other.tolist()) == ([0, 1, 1, 0], [5, 0, 0, 0]), (
        "mx.array.__copy__ no longer keeps in-place updates apart"
    )


def test_a_separate_array_takes_no_memory() -> None:
    array = mx.zeros(1 << 20)
    mx.eval(array)
    before = mx.get_active_memory()
    other = compat.separate(array)
    mx.eval(other)
    assert mx.get_active_memory() - before < array.nbytes, "mx.array.__copy__ copies the memory"


def test_memory_can_be_written_before_what_depends_on_it_is_computed() -> None:
    raw = mx.array(np.zeros(8, np.uint8))
    doubled = 2 * raw
    compat.writable_memory(raw)[:] = bytes(range(8))
    assert doubled.tolist() == [2 * i for i in range(8)], (
        "memoryview of an MLX array: what is written is not what is computed with"
    )
    assert compat.memory(mx.array([7], mx.uint32)).tobytes() == b"\7\0\0\0"


def test_pending_logits_are_taken_for_an_array() -> None:
    pending = PendingLogits(lambda: mx.array([1.0, 2.0]))
    assert (mx.array([1.0, 1.0]) + mx.array(pending)).tolist() == [2, 3], (
        "MLX no longer converts objects by __mlx_array__"
    )


# --- KV caches


@pytest.mark.parametrize("kind", KV_KINDS)
def test_a_cache_lets_itself_be_shadowed_and_committed(kind: str) -> None:
    cache = KV_KINDS[kind]()
    update(cache, 5)
    before = [array.tolist() for array in arrays_of(cache.state)]
    (shadow,) = compat_caches.shadow([cache])
    update(shadow, 1)
    piece = f"mlx_lm.models.cache.{kind}: its __dict__ is no longer all there is to it"
    assert [array.tolist() for array in arrays_of(cache.state)] == before, piece

    compat_caches.commit([cache], [shadow])

    assert str(cache.state) == str(shadow.state), piece


@pytest.mark.parametrize("kind", KV_KINDS)
def test_one_cache_can_be_given_another_update(kind: str) -> None:
    cache, other = KV_KINDS[kind](), KV_KINDS[kind]()
    written = []
    compat_caches.replace_update(cache, lambda keys, values: written.append(keys) or (keys, values))
    update(cache, 2)
    update(other, 2)
    compat_caches.restore_update(cache)
    update(cache, 3)
    assert [keys.shape for keys in written] == [(1, HEADS, 2, SIZE)], (
        f"mlx_lm.models.cache.{kind}: an instance no longer takes a method of its own"
    )


def test_caches_within_a_cache() -> None:
    inner = KVCache(), RotatingKVCache(8)
    cache = CacheList(*inner)
    piece = "mlx_lm.models.cache.CacheList.caches"
    assert compat_caches.members(cache) == inner, piece
    assert compat_caches.members(inner[0]) is None, piece
    nested = CacheList(cache, ArraysCache(1))
    assert list(compat_caches.leaves([nested, inner[0]]))[:2] == [*inner], piece
    compat_caches.set_members(cache, [inner[1], inner[0]])
    assert cache[0] is inner[1], piece


def test_the_size_of_a_window() -> None:
    cache = RotatingKVCache(8)
    assert compat_caches.window(cache) == 8
    assert compat_caches.window(KVCache()) is None
    update(cache, 7)
    assert cache.is_trimmable(), "RotatingKVCache.max_size: below it, it can no longer be trimmed"
    update(cache, 1)
    assert not cache.is_trimmable(), "RotatingKVCache.max_size: a full window can be trimmed"


@pytest.mark.parametrize("kind", ["KVCache", "QuantizedKVCache"])
def test_always_trimmable(kind: str) -> None:
    cache = KV_KINDS[kind]()
    assert compat_caches.is_always_trimmable(cache)
    update(cache, 300)
    assert cache.trim(299) == 299, f"mlx_lm.models.cache.{kind} can't be trimmed at any time"
    assert compat_caches.token_count(cache) == 1, f"mlx_lm.models.cache.{kind}.offset: no tokens"
    assert not compat_caches.is_always_trimmable(RotatingKVCache(8))


def test_how_a_cache_grows() -> None:
    cache = KVCache()
    assert compat_caches.grows_with_tokens(cache)
    update(cache, 1)
    one = cache.nbytes
    update(cache, compat_caches.GROWTH_TOKENS - 1)
    assert cache.nbytes == one, "KVCache.step is no longer by how much it grows"
    update(cache, 1)
    assert cache.nbytes == 2 * one, "KVCache.step is no longer by how much it grows"


@pytest.mark.parametrize("kind", KV_KINDS)
def test_caches_of_one_kind_are_interchangeable(kind: str) -> None:
    first, second = KV_KINDS[kind](), KV_KINDS[kind]()
    assert compat_caches.interchangeable_kind(first) == compat_caches.interchangeable_kind(second)


def test_caches_of_different_sizes_are_not_interchangeable() -> None:
    kinds = map(
        compat_caches.interchangeable_kind,
        [KVCache(), RotatingKVCache(8), RotatingKVCache(9), ArraysCache(1), ArraysCache(2)],
    )
    assert len(set(kinds)) == 5, "mlx-lm's caches no longer have their sizes as attributes"


def test_head_sizes_and_empty_tokens() -> None:
    cache = KVCache()
    assert compat_caches.head_sizes(cache) == []
    compat_caches.add_empty_tokens(cache, 5)
    assert cache.empty()
    update(cache, 3)
    piece = "KVCache.keys and .values are no longer arrays (batch, heads, tokens, size)"
    assert compat_caches.head_sizes(cache) == [SIZE, SIZE], piece
    compat_caches.add_empty_tokens(cache, 5)
    assert cache.size() == 8, piece


@pytest.mark.parametrize("kind", ["KVCache", "RotatingKVCache", "ChunkedKVCache"])
def test_a_counter_has_the_offset_and_mask_of_the_cache_it_stands_for(kind: str) -> None:
    cache, counter = KV_KINDS[kind](), KV_KINDS[kind]()
    compat_caches.make_counter(counter)
    for tokens in (5, 1, 1):
        update(cache, tokens)
        compat_caches.count_tokens(counter, 1, tokens)
        assert counter.offset == cache.offset, f"{kind}.offset depends on the heads' sizes"
    assert compat_caches.quantized(counter, 4, 64) is counter


def test_a_recurrent_state_counts_padding() -> None:
    cache = ArraysCache(2, left_padding=[3, 0])
    compat_caches.count_tokens(cache, batch=2, tokens=2)
    assert cache.left_padding.tolist() == [1, -2], "ArraysCache.advance no longer counts padding"
    assert [array.shape for array in cache.state[0]] == [(2, 1), (2, 1)], "ArraysCache.cache"
    assert compat_caches.is_recurrent(cache)


def test_what_can_be_quantized() -> None:
    cache = KVCache()
    update(cache, 4)
    made = compat_caches.quantized(cache, 8, 64)
    assert isinstance(made, QuantizedKVCache), "KVCache.to_quantized"
    assert compat_caches.token_count(made) == 4, "KVCache.to_quantized loses its tokens"
    state = ArraysCache(1)
    assert compat_caches.quantized(state, 8, 64) is state
    with pytest.raises(NotImplementedError):
        compat_caches.quantized(RotatingKVCache(8), 8, 64)


def test_new_caches_for_a_batch() -> None:
    growing, recurrent = compat_caches.growing_cache(), compat_caches.recurrent_cache()
    assert (growing.is_trimmable(), recurrent.is_trimmable()) == (True, False)
    assert compat_caches.can_merge(growing)
    assert compat_caches.can_merge(recurrent)
    assert not compat_caches.can_merge(QuantizedKVCache()), "quantized caches can be merged by now"


@pytest.mark.parametrize("kind", sorted(KV_KINDS.keys() - {"ConcatenateKVCache"}))
def test_a_cache_is_made_of_its_saved_state(kind: str) -> None:
    cache = KV_KINDS[kind]()
    update(cache, 5)
    made, extent = cache_from_state(KV_KINDS[kind](), kind, cache.state)
    piece = f"mlx_lm.models.cache.{kind}.state has other parts than saved/state.py checks"
    assert str(made.state) == str(cache.state), piece
    assert (extent.rows, extent.tokens) == (1, 5), piece


@pytest.mark.parametrize("kind", ["KVCache", "QuantizedKVCache", "CacheList"])
def test_saved_keys_and_values_grow_by_one_place_a_token(kind: str) -> None:
    cache = CacheList(KVCache(), RotatingKVCache(8)) if kind == "CacheList" else KV_KINDS[kind]()
    update(cache.caches[0] if kind == "CacheList" else cache, 5)
    (saved,) = cache_view.save([cache])
    arrays = {key: leaf for key, leaf in saved.leaves if isinstance(leaf, SavedArray)}
    piece = f"mlx_lm.models.cache.{kind}.state is laid out otherwise than saved/growing.py knows"
    assert len(arrays) == (6 if kind == "QuantizedKVCache" else 2), piece
    assert {(leaf.axis, leaf.values.shape[2]) for leaf in arrays.values()} == {(2, 5)}, piece


class Handle:
    """A cache elsewhere, as RemoteCache is one."""

    def __init__(self, member: Any) -> None:
        self.fetched = 0
        self._member = member

    @property
    def state(self) -> Any:
        return compat_caches.DeferredState(self._fetch)

    def _fetch(self) -> list[tuple[Any, str]]:
        self.fetched += 1
        return [(self._member.state, type(self._member).__name__)]


Handle.__name__ = compat_caches.SAVED_LIST


def test_a_state_elsewhere_is_fetched_only_when_it_is_saved(tmp_path: Path) -> None:
    cache = KVCache()
    update(cache, 4)
    handle = Handle(cache)

    mx.eval([handle.state])
    assert handle.fetched == 0, "mx.eval looks into what only says that it is a list"

    save_prompt_cache(str(tmp_path / "saved.safetensors"), [handle])
    (loaded,) = load_prompt_cache(str(tmp_path / "saved.safetensors"))
    assert handle.fetched == 1
    (member,) = compat_caches.members(loaded) or ()
    assert member.size() == 4, "mlx_lm no longer saves caches by the names of their classes"


def test_a_copied_cache_goes_its_own_way() -> None:
    cache = KVCache()
    update(cache, 4)
    other = copy.deepcopy(cache)
    update(other, 1)
    assert (cache.size(), other.size()) == (4, 5), "copy.deepcopy of mlx-lm's caches"


# --- text


def test_a_text_machine_says_in_its_last_segment_that_it_is_at_the_end() -> None:
    state = TextStateMachine({"normal": [("stop", None)]}).make_state()
    state, parts = TextStateMachine.split(state, "go st")
    assert parts[-1] == ("normal", "go "), "mlx_lm.generate.TextStateMachine.split"
    state, parts = TextStateMachine.split(state, "op and on")
    assert parts[-1][0] is None, "mlx_lm.generate.TextStateMachine.split: no end"


# --- writing ahead of a step is tried first


@pytest.fixture
def untried() -> Iterator[None]:
    compat.writes_reach_device.cache_clear()
    yield
    compat.writes_reach_device.cache_clear()


@pytest.mark.usefixtures("untried")
def test_writing_ahead_works_here_and_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", compat.__name__)
    tries = []
    memory = compat.memory
    monkeypatch.setattr(compat, "memory", lambda array: tries.append(array) or memory(array))
    assert compat.writes_reach_device()
    assert compat.writes_reach_device()
    assert len(tries) == 1
    assert "reaches" in caplog.text


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    "memory",
    [
        lambda array: memoryview(bytearray(array.nbytes)),  # a copy of what the device has
        lambda array: memoryview(bytes(array.nbytes)),  # read-only
        lambda array: memoryview(object()),  # none at all
    ],
    ids=["copy", "read-only", "none"],
)
def test_where_writes_do_not_reach_the_device_that_is_known(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "memory", memory)
    assert not compat.writes_reach_device()


# --- tokenizers


def test_a_family_s_calls_are_known_by_its_template() -> None:
    class Tokenizer:
        chat_template = "<minimax:tool_call>"

        def get_vocab(self) -> dict[str, int]:
            return {}

    tokenizer = Tokenizer()
    assert compat.inferred_tool_parser(tokenizer) == "minimax_m2"
    tokenizer.chat_template = "{{ messages }}"
    assert compat.inferred_tool_parser(tokenizer) == ""


# --- batches


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU compiles in milliseconds")
def test_a_compiled_function_runs_as_it_is_written() -> None:
    ran: list[float] = []

    @mx.compile
    def scaled(array: mx.array, factor: float) -> mx.array:
        ran.append(factor)
        return mx.exp(array * factor)

    with compat.uncompiled():
        for _ in range(3):
            assert float(scaled(mx.array(1.0), 2.0).item()) == pytest.approx(np.exp(2))
    assert ran == [2.0] * 3

    lazily = [scaled(mx.array(1.0), 3.0) for _ in range(3)]
    assert len(lazily) == 3
    assert ran == [2.0] * 3 + [3.0]  # traced once


def test_a_class_is_drawn_by_one_number() -> None:
    logits = mx.array(np.log(np.arange(1, 1001, dtype=np.float32)))[None]
    ends = np.cumsum(np.arange(1, 1001)) / 500500

    assert compat.draws_one_number()
    for seed in range(100):
        number = compat.number_drawn(seed)
        mx.random.seed(seed)
        drawn: Any = mx.random.categorical(logits).item()
        assert abs(drawn - int(np.searchsorted(ends, number, side="right"))) <= 1


def test_rows_of_a_decode_step_are_those_of_its_cache() -> None:
    seen: list[tuple[tuple[int, ...], int]] = []

    class Model:
        layers = (object(),)

        def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
            zeros = mx.zeros((inputs.shape[0], 1, inputs.shape[1], 1))
            cache[0].update_and_fetch(zeros, zeros)
            seen.append((compat.decoding_rows(generator, cache), inputs.shape[0]))
            return mx.zeros((*inputs.shape, 8))

    generator: Any = BatchGenerator(Model(), completion_batch_size=8)
    first = generator.insert([[1]], max_tokens=[9], caches=[[KVCache()]])
    for _ in range(2):
        generator.next()
    generator.close()

    # The first step of a sequence is not yet one of the batch.
    assert seen[0] == ((), 1)
    assert seen[-1] == (tuple(first), 1)


def test_a_batch_has_chosen_the_token_that_its_next_step_returns() -> None:
    class Model:
        layers = (object(),)

        def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
            zeros = mx.zeros((inputs.shape[0], 1, inputs.shape[1], 1))
            cache[0].update_and_fetch(zeros, zeros)
            return mx.eye(9)[inputs + 1]  # after each token, the one above

    generator: Any = BatchGenerator(Model(), completion_batch_size=8)
    (number,) = generator.insert([[1]], max_tokens=[9], caches=[[KVCache()]])
    assert compat.pending_choice(generator, number) is None
    generator.next()

    chosen = compat.pending_choice(generator, number)
    (response,) = generator.next()[1]
    pending = compat.pending_choice(generator, number)
    _, cached = generator.remove([number], return_prompt_caches=True)[number]
    generator.close()

    assert chosen is not None
    assert chosen[0] == response.token == 2
    assert pending is not None
    assert pending[0] == 3
    assert list(cached) == [1, 2], "what is pending must not be in the cache"


# --- nothing of that elsewhere

ROOT = Path(__file__).parents[2]
COMPAT = {
    "node/mlx/compat.py",
    "node/mlx/compat_caches.py",
    "node/mlx/saved/growing.py",
    "node/mlx/saved/state.py",
    "node/weights/hub_compat.py",
    "node/ggml/library.py",
    "node/prompts/compat.py",
}
LIBRARIES = ("mlx", "mlx_lm", "huggingface_hub", "llama_cpp", "transformers", "tokenizers", "grpc")
CACHE_CALLS = {"make_prompt_cache", "can_trim_prompt_cache", "trim_prompt_cache"}


def private_imports(file: Path) -> Iterator[str]:
    """Names with an underscore, and mlx-lm's cache classes, that a module imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIBRARIES):
            module = str(node.module)
            for name in (alias.name for alias in node.names):
                is_private = any(part.startswith("_") for part in f"{module}.{name}".split("."))
                is_cache = module == "mlx_lm.models.cache" and name not in CACHE_CALLS
                if is_private or is_cache:
                    yield f"{file.relative_to(ROOT)}: {module}.{name}"


def test_a_path_of_any_name_is_literal_for_globs_and_for_opening(tmp_path: Path) -> None:
    odd = tmp_path / "a[b]*?"
    odd.mkdir()
    (odd / "c").write_text("d")

    path = compat.literal_path(odd)

    assert glob.glob(str(path / "*")) == [str(odd / "c")]
    assert (path / "c").exists()
    with open(path / "c") as stream:
        assert stream.read() == "d"


def test_private_parts_are_imported_in_one_place_each() -> None:
    rooms = [ROOT / room for room in ("node", "coordinator", "unicluster")]
    generated = ROOT / "unicluster" / "v1"
    files = [f for room in rooms for f in room.rglob("*.py") if f.parent != generated]
    others = [f for f in files if f.relative_to(ROOT).as_posix() not in COMPAT]
    assert [name for file in others for name in private_imports(file)] == []
    assert list(private_imports(ROOT / "node/mlx/compat.py")) == [
        "node/mlx/compat.py: mlx_lm.tokenizer_utils._infer_tool_parser",
        "node/mlx/compat.py: mlx_lm.utils._get_classes",
    ]
