"""A GGUF of all types of llama.cpp, mixed tensor by tensor: cut like any, and its bytes exact."""

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="needs the extra unicluster[ggml]")

from node.ggml import library
from node.ggml.layout import inspect
from node.ggml.load import open_gguf
from node.ggml.stage_file import Part, file_bytes
from tests.support.ggml_stages import CHUNKS, Tiny, make, same, through
from unicluster.checkpoints.fingerprint import whole
from unicluster.checkpoints.gguf import TYPES, nbytes

WIDTH, HEADS, VOCABULARY, LAYERS = 256, 4, 264, 4
ROWS = 4
# Whole numbers, and what is only used while computing; float64 is not for weights.
NOT_WEIGHTS = ("i8", "i16", "i32", "i64", "f64", "q8_1", "q8_k")
WEIGHTS = sorted(kind for kind, (name, *_) in TYPES.items() if name not in NOT_WEIGHTS)


def quantized(kind: int, rows: int, rng: np.random.Generator) -> Any:
    """A random matrix (rows, WIDTH) in ggml's type of that number, as bytes, by ggml itself.

    It is of few rows, again and again: some types take long to find the best numbers.
    """
    repeats, rows = rows // ROWS, ROWS
    numbers = (rng.standard_normal((rows, WIDTH)) / 16).astype(np.float32)
    if kind == library.F32:
        return np.tile(numbers, (repeats, 1))
    base = library.shared_library("ggml-base")
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    data = np.empty((rows, nbytes((WIDTH,), kind)), np.uint8)
    weights = np.ones(WIDTH, np.float32)
    size = base.ggml_quantize_chunk(
        *(kind, ctypes.c_void_p(numbers.ctypes.data), ctypes.c_void_p(data.ctypes.data)),
        *(ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(WIDTH)),
        ctypes.c_void_p(weights.ctypes.data),
    )
    assert size == data.size
    return np.tile(data, (repeats, 1))


def write_mixed(file: Path, kinds: list[int]) -> None:
    """A llama whose matrices are of those types, one after the other."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(file), "llama")
    for key, value in {
        "block_count": LAYERS,
        "context_length": 4096,
        "embedding_length": WIDTH,
        "feed_forward_length": WIDTH,
        "attention.head_count": HEADS,
        "rope.dimension_count": WIDTH // HEADS,
        "vocab_size": VOCABULARY,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    names = [f"blk.{layer}.{name}" for layer in range(LAYERS) for name in MATRICES]
    for place, name in enumerate([*names, "output"]):
        kind = kinds[place % len(kinds)]
        data = quantized(kind, VOCABULARY if name == "output" else WIDTH, rng)
        plain = data.dtype == np.float32
        writer.add_tensor(f"{name}.weight", data, raw_dtype=None if plain else raw_type(kind))
    writer.add_tensor(
        "token_embd.weight", rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    )
    norms = [f"blk.{n}.{name}" for n in range(LAYERS) for name in ("attn_norm", "ffn_norm")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.sweep)])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixed file. ggml needs half a minute to begin with the types of less than four bits."""
    kinds = [kind for kind in WEIGHTS if kind in set(gguf.GGMLQuantizationType)]
    if request.param == "quick":
        kinds = [kind for kind in kinds if not TYPES[kind][0].startswith(("iq1", "iq2", "iq3"))]
    path = tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    write_mixed(path, kinds)
    return path


def raw_type(kind: int) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(kind)


def test_bytes_of_each_type_are_those_of_the_library() -> None:
    base = library.shared_library("ggml-base")
    base.ggml_row_size.restype = ctypes.c_size_t
    for kind in TYPES:
        assert nbytes((WIDTH,), kind) == base.ggml_row_size(kind, ctypes.c_int64(WIDTH)), kind


def test_a_model_of_all_types_is_cut(file: Path) -> None:
    model = Tiny(file, open_gguf(whole(file)), file.parent)

    def logits(*bounds: int) -> list[Any]:
        hops, ops, results = model.stages(*bounds), [make()], []
        for chunk in CHUNKS[:4]:
            results.append(through(hops, [chunk], 1, *ops))
            ops = []
        return results

    expected = logits(0, LAYERS)
    assert len({tensor.type for _, tensor in model.gguf.tensors.values()}) > 15
    for bounds in ((0, 1, LAYERS), (0, 2, LAYERS), (0, 1, 2, 3, LAYERS)):
        for got, wanted in zip(logits(*bounds), expected, strict=True):
            assert np.isfinite(got).all()
            assert same(got, wanted)


def test_the_plan_has_the_bytes_of_the_file(file: Path) -> None:
    model = open_gguf(whole(file))

    layout = inspect(whole(file), 512, 1)

    tensors = sum(tensor.size for _, tensor in model.tensors.values())
    assert sum(layout.layer_bytes) + layout.head_bytes == tensors
    last = Part(LAYERS - 1, LAYERS, has_lm_head=True)
    assert file_bytes(model, last) == layout.layer_bytes[-1]
    assert file.stat().st_size - tensors < 1 << 16
