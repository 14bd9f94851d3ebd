"""Stages of a tiny GGUF in this process, and llama.cpp's logits of the whole file."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from node.ggml.cut import Gguf
from node.ggml.layers import BATCH
from node.ggml.library import computes_on_cpu, llama
from node.ggml.load import load, open_gguf
from node.ggml.stage_file import Part, stage_file
from node.pipeline.pipeline_model import PipelineModel
from tests.support.tiny_gguf import write_gguf
from unicluster.checkpoints.fingerprint import whole
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


def array_of(frame: Frame) -> Any:
    tensor = frame.hidden[0].tensor
    return np.frombuffer(tensor.data, tensor.dtype).reshape(tuple(tensor.shape))


def through(hops: list[Hop], tokens: list[list[int]], cache: int = 1, *ops: CacheOp) -> Any:
    """Logits (batch, columns, vocabulary) for rows of token ids."""
    given: Any = np.array(tokens, np.uint32)
    for hop in hops:
        given = array_of(hop.serve(given, cache, *ops))
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
        wanted.n_threads = wanted.n_threads_batch = 1  # more wait for one another on a busy machine
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
