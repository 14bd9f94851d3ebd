"""Prebuilt decode steps: bit-identical results, and no effect of steps that are not used."""

import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
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
)

from node.mlx import compat
from node.mlx.compat_caches import commit, shadow
from node.mlx.hollow import HollowModel
from node.mlx.lazy import load_lazy
from node.mlx.prebuilt import (
    PlaceholderInput,
    PrebuiltStep,
    StepBuilder,
    kind_of_array,
    kind_of_leaves,
)
from node.mlx.stage import MLXStage
from node.mlx.tensors import DTYPES, decode_tree, encode_tree
from tests.support import zoo
from tests.support.tiny import tiny_config, write_model
from tests.support.wire import on_the_wire
from unicluster.v1.stage_pb2 import CacheOp, Frame, StagePart

HIDDEN = 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_written_later_are_what_is_computed_with(dtype: str) -> None:
    values = mx.array([[1, 0, 1], [0, 1, 1]]).astype(DTYPES[dtype])
    placeholder = PlaceholderInput(kind_of_array(values))
    doubled = mx.concatenate([placeholder.tree, placeholder.tree])

    placeholder.fill(on_the_wire(values))

    assert mx.array_equal(doubled, mx.concatenate([values, values]))


def test_trees_and_plain_values_are_filled_in() -> None:
    leaves = on_the_wire({"result": [mx.ones((2, 3)), None, 7], "state": mx.array([1, 2])})
    placeholder = PlaceholderInput(kind_of_leaves(leaves))

    placeholder.fill(leaves)

    assert placeholder.tree["result"][1:] == [None, 7]
    assert mx.array_equal(placeholder.tree["result"][0], mx.ones((2, 3)))
    assert placeholder.tree["state"].tolist() == [1, 2]


# --- every kind of cache


def attend(entry: Any, x: mx.array) -> mx.array:
    """Something that depends on all that the cache holds."""
    if isinstance(entry, CacheList):
        return sum((attend(member, x) for member in entry.caches), mx.zeros(()))
    if isinstance(entry, ArraysCache):
        old = entry[0] if entry[0] is not None else mx.zeros_like(x)
        entry[0] = 0.5 * old + x[:, :, -1:]
        entry.advance(x.shape[2])
        return mx.sum(entry[0]) + (0 if entry.lengths is None else mx.sum(entry.lengths))
    if isinstance(entry, ChunkedKVCache):
        entry.maybe_trim_front()
    mask = entry.make_mask(x.shape[2]) if isinstance(entry, BatchRotatingKVCache) else None
    keys, values = entry.update_and_fetch(x, 2 * x)
    parts = [*keys, *values] if isinstance(entry, QuantizedKVCache) else [keys, values]
    padding = getattr(entry, "left_padding", mx.zeros(()))
    looked = sum((mx.sum(part.astype(mx.float32)) for part in parts), mx.sum(padding))
    return looked + mx.sum(mx.array(entry.offset)) + (0 if mask is None else mx.sum(mask))


def with_lengths() -> ArraysCache:
    cache = ArraysCache(1, left_padding=[1, 0])
    cache.prepare(lengths=[30, 40])
    return cache


KINDS: dict[str, Callable[[], Any]] = {
    "KVCache": KVCache,
    "ConcatenateKVCache": ConcatenateKVCache,
    "QuantizedKVCache": QuantizedKVCache,
    "RotatingKVCache": lambda: RotatingKVCache(8, keep=2),
    "ChunkedKVCache": lambda: ChunkedKVCache(8),
    "ArraysCache": lambda: ArraysCache(1),
    "ArraysCache with lengths": with_lengths,
    "BatchKVCache": lambda: BatchKVCache([1, 0]),
    "BatchRotatingKVCache": lambda: BatchRotatingKVCache(8, [1, 0]),
    "CacheList": lambda: CacheList(KVCache(), RotatingKVCache(8)),
    "CacheList of states": lambda: CacheList(ArraysCache(1), KVCache()),
}


def inputs() -> Iterator[mx.array]:
    """Five tokens, then one a step, across the end of a buffer of 256."""
    mx.random.seed(3)
    yield mx.random.normal((2, 2, 5, 64))
    for _ in range(255):
        yield mx.random.normal((2, 2, 1, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prebuilt_step_computes_the_usual_result(kind: str) -> None:
    plain, prebuilt = KINDS[kind](), KINDS[kind]()

    def build(x: Any, caches: list[Any]) -> tuple[mx.array, list[Any]]:
        return attend(caches[0], x), []

    for turn, x in enumerate(inputs()):
        wanted = attend(plain, x)
        unused = PrebuiltStep(kind_of_array(x), [prebuilt], build)
        step = PrebuiltStep(kind_of_array(x), [prebuilt], build)
        if turn % 3:
            step.placeholder.fill(on_the_wire(x))
            commit([prebuilt], step.shadows)
            got = step.result
        else:
            got = attend(prebuilt, x)
        assert mx.array_equal(got, wanted), f"step {turn}"
        del unused


@pytest.mark.parametrize("kind", KINDS)
def test_a_shadow_leaves_its_cache_unchanged(kind: str) -> None:
    cache = KINDS[kind]()
    first, second, *_ = inputs()
    attend(cache, first)
    (other,) = shadow([cache])
    attend(other, second)

    (fresh,) = shadow([cache])
    assert mx.array_equal(attend(cache, second), attend(fresh, second))


def test_a_model_that_evaluates_its_input_is_never_prebuilt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = HollowModel(zoo.build("dbrx"), "dbrx", 2, 4)
    builder = StepBuilder()
    kind = kind_of_array(mx.zeros((1, 1, HIDDEN)))
    caplog.set_level(logging.INFO)

    assert builder.build(kind, stage.cache_view.make(), stage.forward) is None
    assert "evaluates its input" in caplog.text


# --- a stage


@pytest.fixture(scope="module", params=["llama", "gemma3", "deepseek_v3"])
def hollow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HollowModel:
    path = write_model(tmp_path_factory.mktemp("model"), tiny_config(request.param))
    lazy = load_lazy(path)
    return HollowModel(lazy.model, lazy.model_type, 2, 6)


class Head:
    """Sends frames to one stage as a head would."""

    def __init__(self, stage: MLXStage) -> None:
        self.stage = stage
        self.session = stage.open(1, last=True)
        self.replies: list[bytes] = []
        self.used = 0
        self._numbers = 0
        self._values = mx.random.key(11)

    def send(
        self, cache: int, *ops: CacheOp, batch: int = 1, tokens: int = 1, hold: bool = False
    ) -> Frame:
        self._numbers += 1
        frame = Frame(id=self._numbers, hold=hold)
        frame.parts.append(StagePart(stage=1, ops=ops, cache=cache))
        self._values, key = mx.random.split(self._values)
        encode_tree(mx.random.normal((batch, tokens, HIDDEN), key=key), frame.hidden)
        self.used += self._is_prebuilt(cache, frame, ops)
        self.stage.serve(self.session, frame, 0.0)
        self.stage.look_ahead(self.session)
        self.replies += [leaf.SerializeToString() for leaf in frame.hidden]
        self.replies.append(b"%d %d" % (frame.reports[0].trimmable, frame.reports[0].size))
        return frame

    def _is_prebuilt(self, cache: int, frame: Frame, ops: tuple[CacheOp, ...]) -> bool:
        caches = self.session.caches
        step = caches[cache].step if cache in caches else None
        return not ops and step is not None and step.kind == kind_of_leaves(frame.hidden)


def make(cache: int) -> CacheOp:
    return CacheOp(cache=cache, make=CacheOp.Make())


def conversation(head: Head) -> None:
    """Two batches in turns, whatever mlx-lm does to caches in between."""
    for cache in (1, 2, 3):
        head.send(cache, make(cache), tokens=5 + cache, hold=True)
    for _ in range(4):  # two lanes
        head.send(1)
        head.send(2)
    head.send(2, tokens=4)  # a guess that is verified
    head.send(2, CacheOp(cache=2, trim=CacheOp.Trim(tokens=1)))
    for _ in range(3):
        head.send(2)
    copied = CacheOp(cache=4, copy=CacheOp.Copy(source=2))
    for _ in range(3):
        head.send(4, *([copied] if _ == 0 else []))
        head.send(2)
    merged = CacheOp(cache=5, merge=CacheOp.Merge(sources=[1, 3]))
    for _ in range(4):
        head.send(5, *([merged] if _ == 0 else []), batch=2)
        head.send(1)
    joined = [
        CacheOp(cache=6, merge=CacheOp.Merge(sources=[2])),
        CacheOp(cache=5, extend=CacheOp.Extend(other=6)),
        CacheOp(cache=6, free=CacheOp.Free()),
    ]
    head.send(5, *joined, batch=3)
    for _ in range(3):
        head.send(5, batch=3)
    head.send(5, CacheOp(cache=5, filter=CacheOp.Filter(rows=[0, 2])), batch=2)
    for _ in range(3):
        head.send(5, batch=2)
    head.send(7, CacheOp(cache=7, extract=CacheOp.Extract(source=5, row=1)))
    for _ in range(3):
        head.send(5, batch=2)
        head.send(7)
    head.send(1, tokens=20, hold=True)
    for _ in range(20):  # round the window of gemma3
        head.send(1)


def test_prebuilt_steps_give_the_usual_replies(hollow: HollowModel) -> None:
    usual, prebuilding = Head(MLXStage(hollow, prebuilt=False)), Head(MLXStage(hollow))

    conversation(usual)
    conversation(prebuilding)

    same = [a == b for a, b in zip(prebuilding.replies, usual.replies, strict=True)]
    assert all(same), f"replies that differ: {[i for i, s in enumerate(same) if not s]}"
    assert usual.used == 0
    assert prebuilding.used > 30


def test_where_writes_do_not_reach_the_device_nothing_is_prebuilt(
    hollow: HollowModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX gives out a copy of what the device has: tokens stay the same, by the usual way."""
    usual, prebuilding = Head(MLXStage(hollow, prebuilt=False)), Head(MLXStage(hollow))
    conversation(usual)
    monkeypatch.setattr(compat, "memory", lambda array: memoryview(bytearray(array.nbytes)))
    compat.writes_reach_device.cache_clear()
    try:
        conversation(prebuilding)
    finally:
        compat.writes_reach_device.cache_clear()

    assert prebuilding.used == 0
    assert prebuilding.replies == usual.replies


def test_freed_caches_leave_no_step_behind(hollow: HollowModel) -> None:
    head = Head(MLXStage(hollow))
    head.send(1, make(1))
    head.send(1)
    head.send(1)
    step = head.session.caches[1].step
    assert step is not None
    left = weakref.ref(step)
    del step

    head.send(2, CacheOp(cache=1, free=CacheOp.Free()), make(2))

    assert 1 not in head.session.caches
    assert left() is None


def test_a_long_cache_is_not_copied(tmp_path: Path) -> None:
    lazy = load_lazy(write_model(tmp_path, tiny_config("llama")))
    hollow = HollowModel(lazy.model, lazy.model_type, 2, 6)
    peaks = []
    for prebuilt in (False, True):
        head = Head(MLXStage(hollow, prebuilt=prebuilt))
        head.send(1, make(1), tokens=1500, hold=True)
        for _ in range(4):
            head.send(1)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(4):
            head.send(1)
        peaks.append(mx.get_peak_memory() - before)
        size = sum(cache.nbytes for cache in head.session.caches[1].entries)
        assert (head.used > 0) == prebuilt

    assert peaks[1] < peaks[0] + size / 100


def test_an_array_that_is_a_view_of_another_is_filled_in() -> None:
    tokens = mx.arange(12, dtype=mx.uint32).reshape(3, 4)[:, 1:2]
    placeholder = PlaceholderInput(kind_of_array(tokens))

    placeholder.fill_array(tokens)

    assert placeholder.tree.tolist() == [[1], [5], [9]]


def test_decoding_the_wire_and_filling_it_in_agree() -> None:
    leaves = on_the_wire(mx.random.normal((2, 1, 8)).astype(mx.bfloat16))
    placeholder = PlaceholderInput(kind_of_leaves(leaves))
    placeholder.fill(leaves)

    assert mx.array_equal(placeholder.tree, decode_tree(leaves))
