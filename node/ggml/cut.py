"""Cutting a GGUF: a file of some layers, which llama.cpp loads as a complete model."""

import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gguf import GGMLQuantizationType

from node.ggml.architectures import (
    INDEXER_KEY,
    PATTERN_KEY,
    RECURRENT_KEY,
    WINDOW_KEY,
    known,
    layer_count,
    layer_kinds,
)
from unicluster.checkpoints.gguf import (
    ALIGNMENT,
    ARRAY,
    BOOL,
    MAGIC,
    PLAIN,
    STRING,
    UINT32,
    Header,
    TensorInfo,
    Value,
    nbytes,
)
from unicluster.checkpoints.ranges import Range
from unicluster.errors import InputError, StageError

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
_LAYER = re.compile(r"blk\.(\d+)\.(.*)")
# Tensors outside the layers that later stages need, all of them small.
_EVERYWHERE = ("output_norm.", "rope_")
# Arrays whose length is not the number of layers, even where it happens to be the same.
_NOT_BY_LAYER = ("rope.dimension_sections",)

F32, IQ1_S = int(GGMLQuantizationType.F32), int(GGMLQuantizationType.IQ1_S)
COPY_BYTES = 1 << 24
ENDLESS = 1 << 30


@dataclass(frozen=True)
class Piece:
    """A tensor of a stage. source: the name in the whole model; None: nothing but zeros."""

    name: str
    shape: tuple[int, ...]
    type: int
    source: str | None

    @property
    def size(self) -> int:
        return nbytes(self.shape, self.type)


class Gguf:
    """A model's header, or those of the files it is split into, by file."""

    def __init__(self, headers: Mapping[str, Header]) -> None:
        """`headers` by the names of their files, the first one of the model first."""
        self.header = next(iter(headers.values()))
        self.tensors: dict[str, tuple[str, TensorInfo]] = {
            name: (file, tensor)
            for file, header in headers.items()
            for name, tensor in header.tensors.items()
        }
        self.layers = layer_count(self.header)
        if not self.layers or EMBEDDING not in self.tensors:
            raise InputError(f"{next(iter(headers))}: no language model is in this GGUF")

    @property
    def embedding(self) -> TensorInfo:
        return self.tensors[EMBEDDING][1]

    @property
    def hidden_size(self) -> int:
        return self.embedding.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.embedding.shape[1]

    @property
    def heads(self) -> int:
        """Attention heads of a layer, of the one with most."""
        count: int | list[int] = self.header.arch("attention.head_count", 0)
        return max(count) if isinstance(count, list) else count

    @property
    def output_name(self) -> str:
        """The tensor of the lm_head: the embedding, where the two are tied."""
        return OUTPUT if OUTPUT in self.tensors else EMBEDDING

    @property
    def is_exact(self) -> bool:
        """Whether the matrices are in full precision, so that the computation should be too."""
        return all(t.type == F32 for _, t in self.tensors.values() if len(t.shape) > 1)

    def of_layer(self, layer: int) -> list[str]:
        """The names of its tensors."""
        return [name for name in self.tensors if name.startswith(f"blk.{layer}.")]

    def outside(self) -> list[str]:
        """The names of the tensors that belong to no layer."""
        return [name for name in self.tensors if not _LAYER.fullmatch(name)]

    def of_stage(self, first: int, end: int, has_lm_head: bool) -> dict[str, list[Range]]:
        """Byte ranges by file that a stage needs, with the embedding for the first stage."""
        names = [p.source for p in self.pieces(first, end, has_lm_head) if p.source is not None]
        if first == 0:
            names.append(EMBEDDING)
        ranges: dict[str, list[Range]] = {}
        for name in names:
            file, tensor = self.tensors[name]
            ranges.setdefault(file, []).append(tensor.bytes)
        return ranges

    def check_cut(self, first: int, end: int) -> None:
        """Raises StageError if llama.cpp can't take the layers [first, end) for a model."""
        name, rule = self.header.architecture, known(self.header)
        if not 0 <= first < end <= self.layers:
            raise StageError(f"{name}: no layers {first} to {end} in a model of {self.layers}")
        if end - first == self.layers:
            return
        if self.layers in rule.whole:
            raise StageError(
                f"{name} of {self.layers} layers is known to llama.cpp by that number, so it "
                "can't be cut: run it on one machine"
            )
        recurrent = layer_kinds(self.header).get(RECURRENT_KEY, [])[first:end]
        if len(set(recurrent)) == 1:
            missing = "attention" if recurrent[0] else "a recurrent state"
            raise StageError(
                f"{name}: llama.cpp needs layers of both kinds in each stage, and of {first} to "
                f"{end - 1} none has {missing}"
            )
        chooses = layer_kinds(self.header).get(INDEXER_KEY, [])
        if chooses and not chooses[first]:
            raise StageError(
                f"{name}: layer {first} attends to what a layer before it chose, so a stage "
                "can't begin with it"
            )
        if end - first in rule.whole:
            raise StageError(
                f"{name}: a stage of {end - first} layers would be taken for another model by "
                "llama.cpp: use other machines, or more or fewer of them (--nodes)"
            )

    def pieces(self, first: int, end: int, has_lm_head: bool) -> list[Piece]:
        """The tensors of a stage; `has_lm_head`: it also has the final norm and the lm_head."""
        self.check_cut(first, end)
        pieces = list(self._outer_pieces(has_lm_head))
        for name, (_, tensor) in self.tensors.items():
            if (match := _LAYER.fullmatch(name)) and first <= int(match[1]) < end:
                renamed = f"blk.{int(match[1]) - first}.{match[2]}"
                pieces.append(Piece(renamed, tensor.shape, tensor.type, name))
        return pieces

    def _outer_pieces(self, has_lm_head: bool) -> Iterator[Piece]:
        """llama.cpp insists on an embedding and an lm_head: where unused, they are of one row.

        What is fed to a stage are hidden states, so a stage that has_lm_head has its lm_head in
        place of the embedding, as tied models have, and needs no other.
        """
        for name in self.outside():
            _, tensor = self.tensors[name]
            if name == EMBEDDING:
                if not has_lm_head:
                    yield Piece(name, (self.hidden_size, 1), F32, None)
                elif not self._needs_output:
                    _, output = self.tensors[self.output_name]
                    yield Piece(name, output.shape, output.type, self.output_name)
                else:
                    kind = IQ1_S if self.hidden_size % 256 == 0 else F32
                    yield Piece(name, tensor.shape, kind, None)
            elif name == OUTPUT:
                if has_lm_head and self._needs_output:
                    yield Piece(name, tensor.shape, tensor.type, name)
                elif self._needs_output:
                    yield Piece(name, (self.hidden_size, 1), F32, None)
            elif name.startswith(_EVERYWHERE) or has_lm_head:
                yield Piece(name, tensor.shape, tensor.type, name)

    @property
    def _needs_output(self) -> bool:
        """Some architectures are never tied."""
        return self.header.architecture in ("gpt-oss", "qwen2moe")

    def metadata(self, first: int, end: int, has_lm_head: bool) -> dict[str, Value]:
        """Metadata of a stage's file."""
        name = self.header.architecture
        blocks = int(self.header.arch("block_count"))
        metadata = {}
        for key, value in self.header.metadata.items():
            field = key.removeprefix(f"{name}.")
            if key.startswith(("tokenizer.", "split.")) or key == "general.alignment":
                continue
            if field != key and field not in _NOT_BY_LAYER and value.length == blocks:
                value = _array(_kind(value), value.read()[first:end])
            metadata[key] = value
        for field, flags in layer_kinds(self.header).items():
            flags = flags[first:end]
            if field == PATTERN_KEY and not any(flags):
                # llama.cpp insists on a windowed layer: one whose window is never full.
                flags = [True for _ in flags]
                metadata[f"{name}.{WINDOW_KEY}"] = _uint32(ENDLESS)
                base = metadata.get(f"{name}.rope.freq_base")
                if base is not None:
                    metadata[f"{name}.rope.freq_base_swa"] = base
            metadata[f"{name}.{field}"] = _array(BOOL, flags)
        dense = self.header.arch("leading_dense_block_count")
        if dense is not None:
            metadata[f"{name}.leading_dense_block_count"] = _uint32(
                min(max(dense - first, 0), end - first)
            )
        metadata.pop(f"{name}.nextn_predict_layers", None)
        metadata[f"{name}.block_count"] = _uint32(end - first)
        metadata[f"{name}.vocab_size"] = _uint32(self.vocabulary if has_lm_head else 1)
        metadata["tokenizer.ggml.model"] = Value(STRING, _string("no_vocab"))
        return metadata


def write(
    gguf: Gguf, folder: Path, stream: IO[bytes], first: int, end: int, has_lm_head: bool
) -> None:
    """Writes the file of a stage to an empty one; `folder` has the model's files."""
    pieces = gguf.pieces(first, end, has_lm_head)
    stream.write(_header(gguf.metadata(first, end, has_lm_head), pieces))
    for piece in pieces:
        stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
        if piece.source is None:
            stream.seek(piece.size - 1, os.SEEK_CUR)  # a hole: zeros that take no room
            stream.write(b"\0")
        else:
            file, tensor = gguf.tensors[piece.source]
            _copy(folder / file, tensor.bytes, stream.fileno(), stream.tell())
            stream.seek(tensor.size, os.SEEK_CUR)


def _copy(file: Path, where: Range, to: int, at: int) -> None:
    with file.open("rb") as source:
        start, end = where
        while start < end:
            data = os.pread(source.fileno(), min(COPY_BYTES, end - start), start)
            if not data:
                raise InputError(f"{file}: ends before byte {end}")
            os.pwrite(to, data, at)
            start, at = start + len(data), at + len(data)


def _header(metadata: Mapping[str, Value], pieces: list[Piece]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(pieces), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), struct.pack("<I", value.type), value.raw]
    at = 0
    for piece in pieces:
        shape = struct.pack(f"<I{len(piece.shape)}Q", len(piece.shape), *piece.shape)
        parts += [_string(piece.name), shape, struct.pack("<IQ", piece.type, at)]
        at = -(-(at + piece.size) // ALIGNMENT) * ALIGNMENT
    header = b"".join(parts)
    return header + b"\0" * (-len(header) % ALIGNMENT)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _uint32(number: int) -> Value:
    return Value(UINT32, struct.pack("<I", number))


def _kind(array: Value) -> int:
    return int(struct.unpack_from("<I", array.raw)[0])


def _array(kind: int, values: Sequence[object]) -> Value:
    head = struct.pack("<IQ", kind, len(values))
    if kind == STRING:
        return Value(ARRAY, head + b"".join(_string(str(value)) for value in values))
    return Value(ARRAY, head + struct.pack(f"<{len(values)}{PLAIN[kind]}", *values))
