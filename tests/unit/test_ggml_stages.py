"""A GGUF cut into stages of ggml gives the whole one's logits, on a CPU bit for bit."""

import copy
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

import mlx.core as mx
from mlx_lm.generate import generate_step

from node.ggml.cutting.kinds import check_cut, forbidden_cuts
from node.ggml.layout import cache_bytes, inspect
from node.ggml.load import open_gguf
from tests.support.ggml_stages import (
    CHUNKS,
    TOKENS,
    Tiny,
    array_of,
    close,
    make,
    same,
    through,
    unsplit,
)
from tests.support.tiny_gguf import ARCHITECTURES, write_gguf
from unicluster.checkpoints.fingerprint import whole
from unicluster.checkpoints.gguf import read_header
from unicluster.errors import InputError, StageError
from unicluster.system import versions
from unicluster.v1.stage_pb2 import CacheOp


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
    hidden = array_of(first.serve(chunk, 1, make(), id=7, hold=True))
    kept = last.serve(hidden, 1, make(), id=7, hold=True)

    assert not kept.hidden
    after = array_of(
        last.serve(array_of(first.serve(np.array([[5]], np.uint32), 1, id=8)), 1, id=8)
    )
    claimed = array_of(last.serve(id=9, claim=7))

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


def test_an_unknown_architecture_is_not_cut(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes().replace(b"llama", b"lambda"[:5]))
    gguf = open_gguf(whole(file))

    check_cut(gguf.header, 0, 6)  # a whole one is left to llama.cpp
    with pytest.raises(StageError, match="lambd: it can't be cut, because which of its prop"):
        check_cut(gguf.header, 0, 3)


def test_an_architecture_that_llama_cpp_does_not_have_is_refused_with_its_version(
    tmp_path: Path,
) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes().replace(b"llama", b"lambd"))
    version = re.escape(metadata.version("llama-cpp-python"))

    with pytest.raises(
        StageError,
        match=f"^model.gguf: llama.cpp as in llama-cpp-python {version} has no architecture lambd",
    ):
        inspect(whole(file), 512, 1)


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ("0.3.35", "install llama-cpp-python==0.3.36 there"),
        ("0.3.36", "it needs a later unicluster, with a later llama-cpp-python"),
    ],
)
def test_which_version_would_have_it_is_said(
    monkeypatch: pytest.MonkeyPatch, here: str, said: str
) -> None:
    needed = ["gguf>=0.19,<0.20", "llama-cpp-python==0.3.36; extra == 'ggml'"]
    monkeypatch.setattr(versions, "version", lambda _: here)
    monkeypatch.setattr(versions, "requires", lambda _: needed)

    assert versions.advice("llama-cpp-python") == said


def test_a_stage_can_t_begin_with_another_layer_s_choice(tmp_path: Path) -> None:
    tiny = Tiny.make(tmp_path, "glm-dsa")

    with pytest.raises(StageError, match="layer 3 attends to what a layer before it chose"):
        tiny.stages(0, 3, 6)


def test_stages_without_attention_are_refused(tmp_path: Path) -> None:
    gguf = Tiny.make(tmp_path, "qwen3next", 12).gguf
    with pytest.raises(StageError, match="of 4 to 6 none has attention"):
        check_cut(gguf.header, 4, 7)
