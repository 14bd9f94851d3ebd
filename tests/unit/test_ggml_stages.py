"""A GGUF cut into stages of ggml gives the whole one's logits, on a CPU bit for bit."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

import mlx.core as mx
from mlx_lm.generate import generate_step

from node.ggml.architectures import forbidden_cuts
from node.ggml.cut import Gguf
from node.ggml.layers import BATCH
from node.ggml.layout import cache_bytes
from node.ggml.library import computes_on_cpu, llama
from node.ggml.load import load, open_gguf
from node.ggml.stage_file import Part, stage_file
from node.pipeline.pipeline_model import PipelineModel
from tests.support.tiny_gguf import ARCHITECTURES, write_gguf
from unicluster.checkpoints.fingerprint import whole
from unicluster.checkpoints.gguf import read_header
from unicluster.errors import InputError, StageError
from unicluster.v1.stage_pb2 import CacheOp, Frame
from unicluster.v1.tensor_pb2 import Leaf

# Prefill in two chunks, across the end of a window of 16; then decode.
TOKENS = [(7 * i * i + 3) % 200 + 1 for i in range(40)]
CHUNKS = [TOKENS[:13], TOKENS[13:24], *([token] for token in TOKENS[24:])]


@dataclass
class Tiny:
    """A GGUF and a folder for what is cut from it."""

    file: Path
    gguf: Gguf
    folder: Path

    @classmethod
    def make(cls, folder: Path, architecture: str = "llama", layers: int = 6) -> "Tiny":
        file = write_gguf(folder / f"{architecture}.gguf", architecture, layers)
        return cls(file, open_gguf(whole(file)), folder)

    def stages(self, *bounds: int, users: int = 2) -> list["Hop"]:
        """Stages between those layers, the last of which gives logits."""
        count = len(bounds) - 2
        return [
            Hop(self, index, Part(first, end, index == count, context=256, users=users))
            for index, (first, end) in enumerate(pairwise(bounds))
        ]

    def front(self) -> Any:
        """All layers, behind the interface of an mlx-lm model."""
        part = Part(0, self.gguf.layers, has_lm_head=True, context=256, users=4)
        return PipelineModel(load(self.gguf, self.folder, self.file, part).front, None)


class Hop:
    """One stage, its session, and the frames that it serves."""

    def __init__(self, tiny: Tiny, index: int, part: Part) -> None:
        checkpoint = whole(tiny.file)
        file = stage_file(tiny.gguf, checkpoint, tiny.folder / "stages", part)
        self.index = index
        self.stage = load(tiny.gguf, tiny.folder, file, part).stage
        self.session = self.stage.open(index, last=part.has_lm_head)

    def serve(self, given: Any = None, cache: int = 0, *ops: CacheOp, **fields: Any) -> Frame:
        """The frame after the stage's part of it. `given`: token ids or hidden states."""
        frame = Frame(**fields)
        if given is not None:
            frame.hidden.append(_leaf(given))
        frame.parts.add(stage=self.index, ops=ops, cache=cache)
        self.stage.serve(self.session, frame, 0.0)
        return frame


def _leaf(array: Any) -> Leaf:
    leaf = Leaf()
    leaf.tensor.dtype = array.dtype.name
    leaf.tensor.shape.extend(array.shape)
    leaf.tensor.data = array.tobytes()
    return leaf


def _array(frame: Frame) -> Any:
    tensor = frame.hidden[0].tensor
    return np.frombuffer(tensor.data, tensor.dtype).reshape(tuple(tensor.shape))


def through(hops: list[Hop], tokens: list[list[int]], cache: int = 1, *ops: CacheOp) -> Any:
    """Logits (batch, columns, vocabulary) for rows of token ids."""
    given: Any = np.array(tokens, np.uint32)
    for hop in hops:
        given = _array(hop.serve(given, cache, *ops))
    return given


def close(got: Any, wanted: Any) -> bool:
    """Equality up to the order in which llama.cpp sums up other batches, or places."""
    return bool(np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max())


def same(got: Any, wanted: Any) -> bool:
    """Bit for bit on a CPU. On GPUs llama.cpp computes neighbours at once, which a cut parts."""
    return bool(np.array_equal(got, wanted)) if computes_on_cpu() else close(got, wanted)


def make(number: int = 1) -> CacheOp:
    return CacheOp(cache=number, make=CacheOp.Make())


def unsplit(file: Path, rows: list[list[list[int]]]) -> list[Any]:
    """llama.cpp's logits of the whole file: of each row's chunks, each row alone."""
    lib = llama()
    given = lib.llama_model_default_params()
    given.load_mode = lib.LLAMA_LOAD_MODE_NONE
    model = lib.llama_model_load_from_file(str(file).encode(), given)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    found = []
    for chunks in rows:
        wanted = lib.llama_context_default_params()
        wanted.n_ctx, wanted.kv_unified, wanted.swa_full = 512, True, True
        wanted.n_batch = wanted.n_ubatch = BATCH
        wanted.type_k = wanted.type_v = 0
        wanted.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = lib.llama_init_from_model(model, wanted)
        at, logits = 0, []
        for chunk in chunks:
            batch = lib.llama_batch_init(len(chunk), 0, 1)
            batch.n_tokens = len(chunk)
            for i, token in enumerate(chunk):
                batch.token[i], batch.pos[i], batch.logits[i] = token, at + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            assert lib.llama_decode(context, batch) == 0
            at += len(chunk)
            shape = (len(chunk), vocabulary)
            logits.append(np.ctypeslib.as_array(lib.llama_get_logits(context), shape).copy())
            lib.llama_batch_free(batch)
        found.append(logits)
        lib.llama_free(context)
    lib.llama_model_free(model)
    return found


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tiny, list[Any]]]:
    # Three groups, so that there are cuts between two layers with attention.
    layers = 12 if request.param == "qwen3next" else 6
    tiny = Tiny.make(tmp_path_factory.mktemp("gguf"), request.param, layers)
    (logits,) = unsplit(tiny.file, [CHUNKS])
    return tiny, logits


def test_logits_are_those_of_the_whole_at_every_cut(model: tuple[Tiny, list[Any]]) -> None:
    tiny, wanted = model
    count = tiny.gguf.layers
    allowed = sorted(set(range(1, count)) - set(forbidden_cuts(tiny.gguf.header)))
    cuts = [(0, cut, count) for cut in allowed]
    every = (0, *allowed, count)
    if tiny.gguf.header.architecture == "qwen3next":
        # Each stage needs one of the layers 3, 7 and 11, which have attention, and another.
        cuts, every = [(0, cut, count) for cut in range(4, 11)], (0, 4, 8, 12)

    for bounds in [*cuts, every, (0, count)]:
        hops = tiny.stages(*bounds)
        ops = [make()]
        for chunk, logits in zip(CHUNKS, wanted, strict=True):
            got = through(hops, [chunk], 1, *ops)[0]
            ops = []
            assert np.isfinite(got).all()
            assert same(got, logits), f"cut {bounds}, {len(chunk)} tokens"


@pytest.mark.parametrize("users", [2, 8])
def test_caches_take_what_the_planner_counts(
    model: tuple[Tiny, list[Any]], caplog: pytest.LogCaptureFixture, users: int
) -> None:
    tiny, _ = model
    caplog.set_level("DEBUG", "unicluster.llama")

    tiny.stages(0, tiny.gguf.layers, users=users)

    kinds = r"(?:llama_kv_cache|llama_memory_recurrent): size = +([\d.]+) MiB"
    told = [float(size) for size in re.findall(kinds, caplog.text)]
    counted = sum(cache_bytes(tiny.gguf, 256, users)) / 2**20
    assert counted == pytest.approx(sum(told), abs=0.011 * len(told))  # told with two digits


def test_sequences_of_unequal_length_do_not_disturb_one_another(
    model: tuple[Tiny, list[Any]],
) -> None:
    tiny, _ = model
    rows = [TOKENS[:9], TOKENS[20:37], TOKENS[5:10]]
    decoded = [[TOKENS[i + step] for i in range(3)] for step in range(4)]
    alone = unsplit(
        tiny.file,
        [[row, *([step[i]] for step in decoded)] for i, row in enumerate(rows)],
    )

    def batched(*bounds: int) -> list[Any]:
        hops = tiny.stages(*bounds, users=4)
        for number, row in enumerate(rows, start=1):
            through(hops, [row], number, make(number))
        ops = [CacheOp(cache=9, merge=CacheOp.Merge(sources=[1, 2, 3]))]
        ops += [CacheOp(cache=number, free=CacheOp.Free()) for number in (1, 2, 3)]
        found = []
        for tokens in decoded:
            found.append(through(hops, [[token] for token in tokens], 9, *ops))
            ops = []
        return found

    cut, together = batched(0, 4, tiny.gguf.layers), batched(0, tiny.gguf.layers)

    assert same(cut, together)
    for step, got in enumerate(together):
        for i, logits in enumerate(alone):
            assert close(got[i], logits[1 + step])


def test_padding_is_left_out(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path)
    rows = [TOKENS[:9], TOKENS[20:25]]
    alone = unsplit(tiny.file, [[row, [7]] for row in rows])
    hops = tiny.stages(0, 3, 6)
    prepare = CacheOp.Prepare(lengths=[9, 5], right_padding=[0, 4])
    merge = CacheOp(cache=3, merge=CacheOp.Merge(sources=[1, 2]))
    ops = [make(1), make(2), merge, CacheOp(cache=3, prepare=prepare)]

    got = through(hops, [rows[0], rows[1] + [0] * 4], 3, *ops)
    finalize = CacheOp(cache=3, finalize=CacheOp.Finalize())
    after = through(hops, [[7], [7]], 3, finalize)

    for i, (prompt, last) in enumerate(alone):
        assert close(got[i, : len(rows[i])], prompt)
        assert close(after[i], last)
    assert not got[1, 5:].any()


def test_a_copy_goes_its_own_way(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path)
    (alone,) = unsplit(tiny.file, [[TOKENS[:9], [5], [6]]])
    hops = tiny.stages(0, 3, 6)
    through(hops, [TOKENS[:9]], 1, make(1))

    through(hops, [[77]], 2, CacheOp(cache=2, copy=CacheOp.Copy(source=1)))
    trim = CacheOp(cache=2, trim=CacheOp.Trim(tokens=1))
    first = through(hops, [[5]], 2, trim, CacheOp(cache=1, free=CacheOp.Free()))
    extract = CacheOp(cache=3, extract=CacheOp.Extract(source=2, row=0))
    second = through(hops, [[6]], 3, extract)

    assert close(first[0], alone[1])
    assert close(second[0], alone[2])


def test_rows_leave_and_join(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path)
    alone = unsplit(tiny.file, [[TOKENS[:9], [5], [6]], [TOKENS[9:20], [8]]])
    hops = tiny.stages(0, 3, 6)
    for number, prompt in ((1, TOKENS[:9]), (2, TOKENS[30:40]), (4, TOKENS[9:20])):
        through(hops, [prompt], number, make(number))
    merge = CacheOp(cache=3, merge=CacheOp.Merge(sources=[2, 1]))
    through(hops, [[1], [5]], 3, merge)

    gone = CacheOp(cache=3, filter=CacheOp.Filter(rows=[1]))
    joined = CacheOp(cache=3, extend=CacheOp.Extend(other=4))
    got = through(hops, [[6], [8]], 3, gone, joined)

    assert close(got[0], alone[0][2])
    assert close(got[1], alone[1][1])


def test_logits_of_a_prefill_chunk_come_only_when_claimed(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path)
    (alone,) = unsplit(tiny.file, [[TOKENS[:24], [5]]])
    first, last = tiny.stages(0, 3, 6)
    chunk = np.array([TOKENS[:24]], np.uint32)
    hidden = _array(first.serve(chunk, 1, make(), id=7, hold=True))
    kept = last.serve(hidden, 1, make(), id=7, hold=True)

    assert not kept.hidden
    after = _array(last.serve(_array(first.serve(np.array([[5]], np.uint32), 1, id=8)), 1, id=8))
    claimed = _array(last.serve(id=9, claim=7))

    assert close(after[0], alone[1])
    assert close(claimed[0], alone[0])


def test_what_is_freed_is_free(tmp_path: Path) -> None:
    (hop,) = Tiny.make(tmp_path).stages(0, 6, users=1)
    query = CacheOp(cache=1, query=CacheOp.Query())
    for _ in range(300):  # more than there can be at once
        through([hop], [TOKENS[:3]], 1, make())
        report = hop.serve(None, 0, query).reports[0].answer
        assert (report.size, report.live, report.empty, report.trimmable) == (3, 1, False, True)
        assert report.nbytes > 0
        hop.serve(None, 0, CacheOp(cache=1, free=CacheOp.Free()))

    hop.stage.end(hop.session)
    assert hop.serve(None, 0, query).reports[0].answer.live == 0


def test_a_saved_cache_comes_back(tmp_path: Path) -> None:
    (alone,) = unsplit((tiny := Tiny.make(tmp_path)).file, [[TOKENS[:9], [5]]])
    hops = tiny.stages(0, 3, 6)
    through(hops, [TOKENS[:9]], 1, make())
    for hop in hops:
        saved = hop.serve(None, 0, CacheOp(cache=1, fetch=CacheOp.Fetch(entry=0))).reports[0].state
        store = CacheOp.Store(entry=0, kind=saved.kind, state=saved.state)
        hop.serve(None, 0, make(2), CacheOp(cache=2, store=store))

    assert close(through(hops, [[5]], 2)[0], alone[1])


def test_a_full_cache_says_so(tmp_path: Path) -> None:
    (hop,) = Tiny.make(tmp_path).stages(0, 6, users=1)
    with pytest.raises(StageError, match="the KV cache of 256 tokens is full"):
        through([hop], [[1] * 300], 1, make())


def test_mlx_lm_generates_over_it(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path)
    model = tiny.front()

    said = [t for t, _ in generate_step(mx.array(TOKENS[:9]), model, max_tokens=8)]

    tokens, chunks = TOKENS[:9], [TOKENS[:9]]
    for _ in range(8):
        logits = unsplit(tiny.file, [chunks])[0][-1][-1]
        tokens = [*tokens, int(logits.argmax())]
        chunks.append(tokens[-1:])
    assert said == tokens[9:]


def test_logits_of_a_long_prompt_at_once(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path)
    (alone,) = unsplit(tiny.file, [[TOKENS]])
    model = tiny.front()
    cache = model.make_cache()

    logits = np.array(model(mx.array([TOKENS]), cache=cache)[0, :, :])

    assert close(logits, alone[0])
    assert cache[0].size() == len(TOKENS)
    assert copy.deepcopy(cache)[0].is_trimmable()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:100], "its header is cut off"),
        (lambda data: data[:-1000], "instead of"),
        (lambda data: b"GGML" + data[4:], "it is no GGUF file"),
        (lambda data: data[:4] + b"\x09" + data[5:], "version 9 of GGUF"),
    ],
    ids=["header", "tensors", "magic", "version"],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, change: Any, said: str) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    file.write_bytes(change(file.read_bytes()))

    with pytest.raises(InputError, match=f"model.gguf: .*{said}"):
        read_header(file)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes().replace(b"llama", b"lambda"[:5]))
    gguf = open_gguf(whole(file))

    with pytest.raises(StageError, match="lambd: a GGUF of it can't be cut yet"):
        gguf.check_cut(0, 3)


def test_a_stage_can_t_begin_with_another_layer_s_choice(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "glm-dsa")

    with pytest.raises(StageError, match="layer 3 attends to what a layer before it chose"):
        tiny.stages(0, 3, 6)


def test_stages_without_attention_are_refused(tmp_path: Path) -> None:
    gguf = Tiny.make(tmp_path, "qwen3next", 12).gguf
    with pytest.raises(StageError, match="of 4 to 6 none has attention"):
        gguf.check_cut(4, 7)
