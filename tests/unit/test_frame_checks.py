"""No frame makes a stage touch memory that is not its caches': each bad number is an error.

UNICLUSTER_FUZZ_SECONDS is how long frames are made up for each engine, UNICLUSTER_FUZZ_SEED which.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from node.mlx.hollow import HollowModel
from node.mlx.lazy import load_lazy
from node.mlx.stage import MLXStage
from node.mlx.tensors import encode_tree
from node.ring.bounds import FrameError
from tests.support import zoo
from tests.support.frame_fuzz import FrameFuzz
from tests.support.stage_head import StageHead, leaf, op
from tests.support.tiny import tiny_config, write_model
from unicluster.errors import StageError
from unicluster.v1.stage_pb2 import CacheOp, CacheState, Frame
from unicluster.v1.tensor_pb2 import Leaf

HIDDEN, VOCABULARY = 64, 264
FUZZ_SECONDS = float(os.environ.get("UNICLUSTER_FUZZ_SECONDS", "9"))
FUZZ_SEED = int(os.environ.get("UNICLUSTER_FUZZ_SEED", "1"))
HUGE = 2**62

Heads = Callable[[], StageHead]


def hidden(batch: int, tokens: int, width: int = HIDDEN) -> Any:
    values = np.random.default_rng(batch * 1000 + tokens).standard_normal((batch, tokens, width))
    return values.astype(np.float32)


def token_ids(batch: int, tokens: int) -> Any:
    return (np.arange(batch * tokens, dtype=np.uint32) % 200).reshape(batch, tokens)


def of_mlx(folder: Path, architecture: str) -> Heads:
    lazy = load_lazy(write_model(folder, tiny_config(architecture)))
    stage = MLXStage(HollowModel(lazy.model, lazy.model_type, 2, 6))
    return lambda: StageHead(stage, hidden)


def of_ggml(folder: Path, architecture: str, first: int, *, is_last: bool = True) -> Heads:
    pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")
    from node.ggml.load import load, open_gguf
    from node.ggml.stage_file import Part, stage_file
    from tests.support.tiny_gguf import write_gguf
    from unicluster.checkpoints.fingerprint import whole

    file = write_gguf(folder / "model.gguf", architecture, 12 if "next" in architecture else 6)
    checkpoint = whole(file)
    gguf = open_gguf(checkpoint)
    part = Part(first, gguf.layers, has_lm_head=is_last, context=256, users=2)
    cut = stage_file(gguf, checkpoint, folder / "stages", part)
    stage = load(gguf, folder, cut, part).stage
    return lambda: StageHead(stage, hidden if first else token_ids)


ENGINES: dict[str, Callable[[Path], Heads]] = {
    "mlx llama": lambda folder: of_mlx(folder, "llama"),
    "mlx gemma3": lambda folder: of_mlx(folder, "gemma3"),
    "ggml llama": lambda folder: of_ggml(folder, "llama", 2),
    "ggml llama stage 0": lambda folder: of_ggml(folder, "llama", 0),
    "ggml qwen3next": lambda folder: of_ggml(folder, "qwen3next", 4),
    "ggml llama in the middle": lambda folder: of_ggml(folder, "llama", 2, is_last=False),
}


@pytest.fixture(scope="module", params=ENGINES)
def heads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Heads:
    return ENGINES[request.param](tmp_path_factory.mktemp("model"))


def prepared(head: StageHead) -> None:
    """Caches 1 and 2 of one row, 3 of two; 4 new; 5 a snapshot of 1. Frame 90 is held."""
    head.forward(1, 1, 5, op(1, "make"))
    head.forward(2, 1, 3, op(2, "make"), id=90, hold=True)
    head.send(op(3, "merge", sources=[1, 2]))
    head.forward(3, 2, 1)
    head.send(op(4, "make"), op(5, "snapshot", source=1))


def store(entry: int, kind: str, *leaves: Leaf) -> CacheOp:
    made = op(4, "store", entry=entry, kind=kind)
    made.store.state.extend(leaves)
    return made


OPERATIONS: dict[str, CacheOp] = {
    "none": CacheOp(cache=1),
    "make 0": op(0, "make"),
    "make twice": op(1, "make"),
    "merge of nothing": op(9, "merge"),
    "merge of a missing cache": op(9, "merge", sources=[1, 77]),
    "merge into one that is there": op(1, "merge", sources=[2]),
    "merge of a batch": op(9, "merge", sources=[1, 3]),
    "merge of a snapshot": op(9, "merge", sources=[5]),
    "filter of a missing cache": op(77, "filter", rows=[0]),
    "filter by a row too many": op(3, "filter", rows=[0, 2]),
    "filter by a huge row": op(3, "filter", rows=[2**32 - 1]),
    "filter by no row": op(3, "filter"),
    "filter by a row twice": op(3, "filter", rows=[1, 1]),
    "extend by a missing cache": op(3, "extend", other=77),
    "extend of a missing cache": op(77, "extend", other=3),
    "extend by itself": op(3, "extend", other=3),
    "extract of a row too many": op(9, "extract", source=3, row=2),
    "extract of a huge row": op(9, "extract", source=3, row=2**32 - 1),
    "extract of a missing cache": op(9, "extract", source=77, row=0),
    "extract into one that is there": op(1, "extract", source=3, row=0),
    "prepare of a missing cache": op(77, "prepare", lengths=[1]),
    "prepare with too few lengths": op(3, "prepare", lengths=[1], right_padding=[0]),
    "prepare with too many lengths": op(3, "prepare", lengths=[1] * 9, right_padding=[0] * 9),
    "prepare with a negative length": op(3, "prepare", lengths=[-1, 5], right_padding=[5, -1]),
    "prepare with huge lengths": op(3, "prepare", lengths=[HUGE, 1], right_padding=[0, HUGE - 1]),
    "prepare with negative padding": op(3, "prepare", lengths=[5, 5], right_padding=[-9, -9]),
    "prepare with unequal columns": op(3, "prepare", lengths=[5, 5], right_padding=[0, 9]),
    "prepare with padding alone": op(3, "prepare", right_padding=[0, 1]),
    "left padding of a filled cache": op(3, "prepare", left_padding=[0, 1]),
    "left padding that is negative": op(3, "prepare", left_padding=[-5, -5]),
    "finalize of a missing cache": op(77, "finalize"),
    "trim of a missing cache": op(77, "trim", tokens=1),
    "trim by more than is there": op(1, "trim", tokens=6),
    "trim by a huge number": op(1, "trim", tokens=2**64 - 1),
    "trim of a snapshot": op(5, "trim", tokens=1),
    "copy of a missing cache": op(9, "copy", source=77),
    "copy of a snapshot": op(9, "copy", source=5),
    "copy into one that is there": op(2, "copy", source=1),
    "free of a missing cache": op(77, "free"),
    "query of a snapshot": op(5, "query"),
    "fetch of a missing cache": op(77, "fetch", entry=0),
    "fetch of an entry too many": op(1, "fetch", entry=99),
    "store to a missing cache": op(77, "store", entry=0, kind="KVCache"),
    "store to an entry too many": op(4, "store", entry=99, kind="KVCache"),
    "store of no state": op(4, "store", entry=0, kind="KVCache"),
    "store of a function": op(4, "store", entry=0, kind="make_prompt_cache"),
    "store of no class": op(4, "store", entry=0, kind="__builtins__"),
    "store of one number": store(0, "KVCache", Leaf(json="7")),
    "store at a huge index": store(0, "KVCache", leaf(hidden(1, 1), "999999999")),
    "store too deep": store(0, "KVCache", leaf(hidden(1, 1), ".".join("0" * 99))),
    "quantize of a missing cache": op(9, "quantize", source=77, bits=4, group_size=32),
    "quantize to 5000 bits": op(9, "quantize", source=1, bits=5000, group_size=32),
    "quantize to no bits": op(9, "quantize", source=1, bits=0, group_size=0),
    "quantize in groups of 1": op(9, "quantize", source=1, bits=4, group_size=1),
    "snapshot of a missing cache": op(9, "snapshot", source=77),
    "restore of a missing cache": op(77, "restore", snapshot=5),
    "restore without a snapshot": op(1, "restore", snapshot=77),
    "restore of a cache that is none": op(1, "restore", snapshot=2),
    "restore by other tokens": op(1, "restore", snapshot=5, tokens=3),
    "restore to other rows": op(3, "restore", snapshot=5, tokens=1),
    "restore of the snapshot": op(5, "restore", snapshot=5),
}


def still_works(heads: Heads) -> None:
    """A new session finds all there is room for, and gives the logits that it should."""
    head = heads()
    head.forward(1, 1, 5, op(1, "make"))
    head.forward(1, 1, 1)
    assert head.report(op(1, "query")).answer.live == 1
    head.end()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_can_t_be_is_refused(heads: Heads, name: str) -> None:
    head, other = heads(), heads()
    prepared(head)
    wanted = other.forward(1, 1, 5, op(1, "make"))
    bad = OPERATIONS[name]

    with pytest.raises(FrameError) as refused:
        head.send(bad)

    said = str(refused.value)
    assert "\n" not in said
    assert name == "none" or bad.WhichOneof("op") in said
    head.end()
    again = heads()
    assert close(again.forward(1, 1, 5, op(1, "make")), wanted)
    other.forward(1, 1, 1)
    other.end()
    again.end()
    still_works(heads)


def empty(head: StageHead) -> Frame:
    return head.frame(cache=1)


def with_leaf(change: Callable[[Leaf], None], cache: int = 1) -> Callable[[StageHead], Frame]:
    def make(head: StageHead) -> Frame:
        frame = head.frame(cache=cache, hidden=[leaf(head.inputs(1, 2))])
        change(frame.hidden[0])
        return frame

    return make


def with_array(batch: int, tokens: int, cache: int) -> Callable[[StageHead], Frame]:
    return lambda head: head.frame(cache=cache, hidden=[leaf(head.inputs(batch, tokens))])


def reshaped(*shape: int) -> Callable[[Leaf], None]:
    def change(changed: Leaf) -> None:
        changed.tensor.shape[:] = shape

    return change


def retyped(dtype: str, size: int) -> Callable[[Leaf], None]:
    def change(changed: Leaf) -> None:
        changed.tensor.dtype = dtype
        changed.tensor.data = bytes(size * int(np.prod(changed.tensor.shape)))

    return change


def wider(head: StageHead) -> Frame:
    array = head.inputs(1, 2)
    more = np.concatenate([array, array], axis=-1)
    return head.frame(cache=1, hidden=[leaf(more[None] if array.ndim == 2 else more)])


def two_parts(head: StageHead) -> Frame:
    frame = head.frame(op(9, "make"))
    frame.parts.add(stage=head.index, ops=[op(10, "make")])
    return frame


def another_stage(stage: int) -> Callable[[StageHead], Frame]:
    def make(head: StageHead) -> Frame:
        frame = head.frame()
        frame.parts.add(stage=stage)
        return frame

    return make


def held(number: int) -> Callable[[StageHead], Frame]:
    return lambda head: head.frame(cache=1, hidden=[leaf(head.inputs(1, 3))], id=number, hold=True)


FRAMES: dict[str, Callable[[StageHead], Frame]] = {
    "no hidden state": empty,
    "a missing cache": with_array(1, 1, 77),
    "a snapshot": with_array(1, 1, 5),
    "a batch too large": with_array(3, 1, 3),
    "a batch too small": with_array(1, 1, 3),
    "a batch for one row": with_array(2, 1, 1),
    "no rows": with_array(0, 1, 1),
    "no tokens": with_array(1, 0, 1),
    "a width of its own": wider,
    "one dimension": with_leaf(reshaped(2 * HIDDEN)),
    "a shape without its bytes": with_leaf(reshaped(1, 2**40, HIDDEN)),
    "a negative shape": with_leaf(reshaped(-1, -2, HIDDEN)),
    "many dimensions": with_leaf(lambda changed: changed.tensor.shape.extend([1] * 200_000)),
    "no dtype": with_leaf(retyped("float99", 4)),
    "bytes": with_leaf(retyped("uint8", 1)),
    "complex numbers": with_leaf(retyped("complex64", 8)),
    "a number for an array": with_leaf(lambda changed: changed.MergeFrom(Leaf(json="1"))),
    "a tree of a billion": with_leaf(lambda changed: setattr(changed, "key", "999999999")),
    "two arrays": lambda head: head.frame(
        cache=1, hidden=[leaf(head.inputs(1, 1), "0"), leaf(head.inputs(1, 1), "1")]
    ),
    "two parts for a stage": two_parts,
    "a part for the head": another_stage(0),
    "a part behind the last stage": another_stage(2),
    "a claim of what is not held": lambda head: head.frame(claim=77),
    "a claim beside a forward": lambda head: head.frame(
        cache=1, hidden=[leaf(head.inputs(1, 1))], claim=90
    ),
    "a result held twice": held(90),
    "a result held without a number": held(0),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_can_t_be_is_refused(heads: Heads, name: str) -> None:
    head, other = heads(), heads()
    prepared(head)
    wanted = other.forward(1, 1, 5, op(1, "make"))

    with pytest.raises(FrameError):
        head.serve(FRAMES[name](head))

    head.end()
    again = heads()
    assert close(again.forward(1, 1, 5, op(1, "make")), wanted)
    other.end()
    again.end()


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """They are rows of a file, in which other things come after the embedding."""
    heads = ENGINES["ggml llama stage 0"](tmp_path)
    for dtype, bad in ((np.uint32, VOCABULARY), (np.uint32, 2**32 - 1), (np.int32, -1)):
        head = heads()
        head.send(op(1, "make"))
        with pytest.raises(FrameError, match=r"token ids .*, not within 0-263"):
            head.send(cache=1, hidden=[leaf(np.array([[5, bad]], dtype))])
        head.end()


def test_infinite_hidden_states_stay_out_of_the_kv_cache(tmp_path: Path) -> None:
    head = ENGINES["ggml llama"](tmp_path)()
    head.send(op(1, "make"))
    for bad in (np.nan, np.inf):
        with pytest.raises(FrameError, match="infinite"):
            head.send(cache=1, hidden=[leaf(hidden(1, 2) * np.float32(bad))])


def test_more_rows_than_sequences_take_none(tmp_path: Path) -> None:
    heads = ENGINES["ggml qwen3next"](tmp_path)
    for _ in range(20):
        head = heads()
        with pytest.raises(StageError, match=r"all that llama\.cpp can keep apart"):
            head.forward(1, 60, 1, op(1, "make"))
        head.end()
    still_works(heads)


Change = Callable[[CacheOp.Store], None]


def numbered(index: int, json: str) -> Change:
    def change(saved: CacheOp.Store) -> None:
        saved.state[index].json = json

    return change


def array(index: int, shape: tuple[int, ...], dtype: Any = np.float32) -> Change:
    def change(saved: CacheOp.Store) -> None:
        saved.state[index].CopyFrom(leaf(np.zeros(shape, dtype), saved.state[index].key))

    return change


def cut(saved: CacheOp.Store) -> None:
    del saved.state[-1]


def kind(name: str) -> Change:
    return lambda saved: setattr(saved, "kind", name)


# A KVCache of llama is (keys, values, offset), its keys and values (1, 2, 256, 16).
SAVED: dict[str, Change] = {
    "an offset too large": numbered(2, "257"),
    "a negative offset": numbered(2, "-1"),
    "an offset that is none": numbered(2, '"x"'),
    "a broken number": numbered(2, "{"),
    "no offset": cut,
    "keys of fewer heads": array(0, (1, 1, 256, 16)),
    "keys and values of more heads": lambda saved: (
        array(0, (1, 4, 256, 16))(saved),
        array(1, (1, 4, 256, 16))(saved),
    )[0],
    "keys and values of integers": lambda saved: (
        array(0, (1, 2, 256, 16), np.int32)(saved),
        array(1, (1, 2, 256, 16), np.int32)(saved),
    )[0],
    "keys and values of another dtype": lambda saved: (
        array(0, (1, 2, 256, 16), np.float16)(saved),
        array(1, (1, 2, 256, 16), np.float16)(saved),
    )[0],
    "keys of two dimensions": array(0, (256, 16)),
    "no rows": array(0, (0, 2, 256, 16)),
    "values of another length": array(1, (1, 2, 128, 16)),
    "another class": kind("RotatingKVCache"),
    "a cache of ggml": kind("ArraysCache"),
    "a quantized cache": kind("QuantizedKVCache"),
    "a batch": kind("BatchKVCache"),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_state_that_can_t_be_is_refused(tmp_path: Path, name: str) -> None:
    head = ENGINES["mlx llama"](tmp_path)()
    head.forward(1, 1, 5, op(1, "make"))
    state = head.report(op(1, "fetch", entry=0)).state
    bad = op(2, "store", entry=0, kind=state.kind)
    bad.store.state.extend(state.state)
    SAVED[name](bad.store)

    with pytest.raises(FrameError):
        head.forward(2, 1, 1, op(2, "make"), bad)


def close(got: Frame, wanted: Frame) -> bool:
    """Equal, but for the order in which llama.cpp sums up what lies in other places."""
    arrays = [np.frombuffer(frame.hidden[0].tensor.data, np.float32) for frame in (got, wanted)]
    return bool(np.abs(arrays[0] - arrays[1]).max() <= 1e-4 * np.abs(arrays[1]).max())


def test_made_up_frames_end_sessions_and_nothing_else(heads: Heads) -> None:
    """A fuzzer, and so long: as long as FUZZ_SECONDS says for all that is made of an engine."""
    steady = heads()
    wanted = steady.forward(1, 1, 5, op(1, "make"))
    fuzz = FrameFuzz(heads, FUZZ_SEED)
    end = time.monotonic() + FUZZ_SECONDS / 3
    while time.monotonic() < end:
        for _ in range(50):
            fuzz.step()
        fuzz.restart()  # its session may have all sequences that llama.cpp can keep apart
        again = steady.forward(2, 1, 5, op(2, "make"))
        assert close(again, wanted)
        steady.send(op(2, "free"))
    fuzz.end()
    steady.end()

    assert fuzz.served > 100
    assert fuzz.refused > 10
    still_works(heads)


def test_rows_chosen_by_another_machine_stay_within_the_compressed_cache() -> None:
    """A layer of deepseek_v41 attends to what the index of an earlier one has chosen."""
    name = "deepseek_v41: shared index"
    front = HollowModel(zoo.build(name), name, 0, 1)
    stage = MLXStage(HollowModel(zoo.build(name), name, 1, 4))
    crossed, _ = front.front(mx.arange(9)[None], front.cache_view.make())

    def attended(chosen: int | None) -> bytes:
        head = StageHead(stage, hidden)
        frame = head.frame(op(1, "make"), cache=1)
        encode_tree(crossed, frame.hidden)
        (rows,) = [leaf for leaf in frame.hidden if leaf.key == "written.shared.topk_idx"]
        if chosen is not None:
            rows.tensor.data = np.full(rows.tensor.shape, chosen, np.int32).tobytes()
        head.serve(frame)
        head.end()
        assert frame.reports[0].size == 9
        return frame.hidden[0].tensor.data

    last = 9 // 2 - 1  # two tokens are a row
    assert attended(None) != attended(last)
    for chosen in (last + 1, 9):  # rows of other batches, or of other memory
        assert attended(chosen) == attended(last)
    with pytest.raises(FrameError, match="positions"):
        attended(2**30)


def parts(state: CacheState, size: int) -> list[CacheOp]:
    """Operations that store a state in parts of so many bytes."""
    whole = state.SerializeToString()
    starts = range(0, len(whole), size)
    return [
        op(2, "store", entry=0, part=whole[at : at + size], more=at + size < len(whole))
        for at in starts
    ]


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ggml llama stage 0"])
def test_a_state_goes_and_comes_in_parts(engine: str, tmp_path: Path) -> None:
    head = ENGINES[engine](tmp_path)()
    head.forward(1, 1, 5, op(1, "make"))
    whole = head.report(op(1, "fetch", entry=0)).state
    received, size = b"", 1000
    while True:
        asked = op(1, "fetch", entry=0, offset=len(received), most_bytes=size)
        answered = head.report(asked).state
        received += answered.part
        if len(received) == answered.total:
            break
    assert CacheState.FromString(received) == whole
    head.send(op(2, "make"))
    for index, part in enumerate(parts(whole, size)):
        head.send(part, op(3 + index, "make"))  # others' operations come between them

    again = head.report(op(2, "fetch", entry=0)).state
    assert [leaf.json for leaf in again.state] == [leaf.json for leaf in whole.state]
    assert again.kind == whole.kind
    assert [len(leaf.tensor.data) for leaf in again.state] == [
        len(leaf.tensor.data) for leaf in whole.state
    ]
    head.end()


PARTS: dict[str, Callable[[list[CacheOp]], list[CacheOp]]] = {
    "one is missing": lambda ops: [*ops[:1], *ops[2:]],
    "one twice": lambda ops: [*ops[:2], *ops[1:]],
    "the last alone": lambda ops: ops[-1:],
    "of no state": lambda ops: [op(2, "store", entry=0, part=b"\xff" * 99)],
    "too many at once": lambda ops: [
        *(op(number, "make") for number in range(3, 20)),
        *(op(number, "store", entry=0, part=b"x", more=True) for number in range(3, 20)),
    ],
    "of an entry too many": lambda ops: [op(2, "store", entry=99, part=b"x", more=True)],
    "from beyond the end": lambda ops: [op(1, "fetch", entry=0, offset=2**40, most_bytes=9)],
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_are_no_state_are_refused(name: str, tmp_path: Path) -> None:
    heads = ENGINES["ggml llama"](tmp_path)
    head = heads()
    head.forward(1, 1, 5, op(1, "make"))
    state = head.report(op(1, "fetch", entry=0)).state
    head.send(op(2, "make"))

    with pytest.raises(FrameError):
        _ = [head.send(each) for each in PARTS[name](parts(state, 1000))]

    head.end()
    still_works(heads)
