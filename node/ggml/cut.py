"""Cutting a GGUF: a file of some layers, which llama.cpp loads as a complete model."""

import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gguf import GGMLQuantizationType

from node.ggml.cutting.kinds import check_cut, known, layer_count
from node.ggml.cutting.metadata import stage_metadata, text
from node.weights.clone import MOST_BLOCK, block_size, clone
from unicluster.checkpoints.checkpoint import write_at
from unicluster.checkpoints.gguf import (
    ALIGNMENT,
    MAGIC,
    STRING,
    Header,
    TensorInfo,
    Value,
    nbytes,
)
from unicluster.checkpoints.ranges import Range
from unicluster.errors import InputError

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
OF_OUTPUT = "output."  # such as its bias, of as many numbers as there are tokens
_LAYER = re.compile(r"blk\.(\d+)\.(.*)")
F32, IQ1_S = int(GGMLQuantizationType.F32), int(GGMLQuantizationType.IQ1_S)
I32 = int(GGMLQuantizationType.I32)
# Some models have positions that are added to the embedding, of an architecture that may.
POSITIONS, WITH_POSITIONS = "position_embd.weight", "inpL"
COPY_BYTES = 1 << 24
# A key of nothing but spaces, by which tensors come to the places in blocks that they have in the
# model's file.
PADDING = "unicluster.padding"


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
        return all(t.type in (F32, I32) for _, t in self.tensors.values() if len(t.shape) > 1)

    def of_layer(self, layer: int) -> list[str]:
        """The names of its tensors."""
        return [name for name in self.tensors if name.startswith(f"blk.{layer}.")]

    def outside(self) -> list[str]:
        """The names of the tensors that belong to no layer."""
        return [name for name in self.tensors if not _LAYER.fullmatch(name)]

    def of_stage(self, first: int, end: int, has_lm_head: bool) -> dict[str, list[Range]]:
        """Byte ranges by file that a stage needs, with the embedding for the first stage."""
        names = [p.source for p in self.pieces(first, end, has_lm_head) if p.source is not None]
        if first == 0 and EMBEDDING not in names:
            names.append(EMBEDDING)
        ranges: dict[str, list[Range]] = {}
        for name in names:
            file, tensor = self.tensors[name]
            ranges.setdefault(file, []).append(tensor.bytes)
        return ranges

    def pieces(self, first: int, end: int, has_lm_head: bool) -> list[Piece]:
        """The tensors of a stage; `has_lm_head`: it also has the final norm and the lm_head."""
        check_cut(self.header, first, end)
        pieces = list(self._outer_pieces(has_lm_head, self.takes_tokens(first, end)))
        for name, (_, tensor) in self.tensors.items():
            if (match := _LAYER.fullmatch(name)) and first <= int(match[1]) < end:
                renamed = f"blk.{int(match[1]) - first}.{match[2]}"
                pieces.append(Piece(renamed, tensor.shape, tensor.type, name))
        return pieces

    def _outer_pieces(self, has_lm_head: bool, tokens: bool) -> Iterator[Piece]:
        """llama.cpp insists on an embedding and an lm_head: where unused, they are of one row.

        What is fed to a stage are hidden states, so a stage that has_lm_head has its lm_head in
        place of the embedding, as tied models have, and needs no other. The other tensors outside
        the layers are small, and llama.cpp wants them everywhere.
        """
        for name in self.outside():
            _, tensor = self.tensors[name]
            if name == EMBEDDING:
                yield self._embedding_piece(has_lm_head, tokens)
            elif name.startswith(OF_OUTPUT) and name != OUTPUT and not has_lm_head and not tokens:
                shape = tuple(1 if size == self.vocabulary else size for size in tensor.shape)
                yield Piece(name, shape, F32, None)
            elif name != OUTPUT or (has_lm_head and (self._needs_output or tokens)):
                yield Piece(name, tensor.shape, tensor.type, name)
            elif self._needs_output:
                shape = (self.hidden_size, self.vocabulary if tokens else 1)
                kind = IQ1_S if tokens and self.hidden_size % 256 == 0 else F32
                yield Piece(name, shape, kind, None)

    def _embedding_piece(self, has_lm_head: bool, tokens: bool) -> Piece:
        _, tensor = self.tensors[EMBEDDING]
        if tokens:
            return Piece(EMBEDDING, tensor.shape, tensor.type, EMBEDDING)
        if not has_lm_head:
            return Piece(EMBEDDING, (self.hidden_size, 1), F32, None)
        if not self._needs_output:
            _, output = self.tensors[self.output_name]
            return Piece(EMBEDDING, output.shape, output.type, self.output_name)
        kind = IQ1_S if self.hidden_size % 256 == 0 else F32
        return Piece(EMBEDDING, tensor.shape, kind, None)

    @property
    def _needs_output(self) -> bool:
        """Some architectures are never tied."""
        return known(self.header).untied and OUTPUT in self.tensors

    def takes_tokens(self, first: int, end: int) -> bool:
        """Whether llama.cpp looks up the embedding: of a whole model, or where layers need ids."""
        rule = known(self.header)
        leading = int(self.header.arch(rule.leading, 0)) if rule.leading else 0
        return first == 0 and (end == self.layers or leading > 0)

    def entry(self, first: int, end: int) -> str:
        """The tensor that a stage's input is put into; empty: llama.cpp takes it as its own."""
        rule = known(self.header)
        if self.takes_tokens(first, end) or (first == 0 and not rule.refuses_rows):
            return ""
        if rule.entry == WITH_POSITIONS and POSITIONS not in self.tensors:
            return ""
        return rule.entry

    @property
    def width(self) -> int:
        """Numbers that a layer outputs for each token."""
        streams = known(self.header).streams
        return self.hidden_size * (int(self.header.arch(streams, 1)) if streams else 1)

    def metadata(self, first: int, end: int, has_lm_head: bool) -> dict[str, Value]:
        """Metadata of a stage's file."""
        rows = self.vocabulary if has_lm_head or self.takes_tokens(first, end) else 1
        return stage_metadata(self.header, first, end, rows)


def write(
    gguf: Gguf, folder: Path, stream: IO[bytes], first: int, end: int, has_lm_head: bool
) -> None:
    """Writes the file of a stage to an empty one; `folder` has the model's files.

    llama.cpp wants tensors one behind the other. So the longest run of them that are so in the
    model comes first, at a place whose blocks the two files can share on some file systems.
    """
    run, others = _parted(gguf, gguf.pieces(first, end, has_lm_head))
    begin = gguf.tensors[run[0].source][1].bytes[0] if run and run[0].source else 0
    metadata = gguf.metadata(first, end, has_lm_head)
    block = block_size(stream.fileno())
    if begin and not begin % ALIGNMENT:
        metadata[PADDING] = Value(STRING, text(""))
        missing = (begin - len(_header(metadata, [*run, *others], padded=False))) % block
        metadata[PADDING] = Value(STRING, text(" " * missing))
    stream.write(_header(metadata, [*run, *others]))
    if run:
        _share(gguf, folder, run, stream, block)
    for piece in others:
        stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
        if piece.source is None:
            stream.seek(piece.size - 1, os.SEEK_CUR)  # a hole: zeros that take no room
            stream.write(b"\0")
        else:
            file, tensor = gguf.tensors[piece.source]
            _copy(folder / file, tensor.bytes, stream.fileno(), stream.tell())
            stream.seek(tensor.size, os.SEEK_CUR)


def copied_bytes(gguf: Gguf, first: int, end: int, has_lm_head: bool) -> int:
    """Bytes of a stage's file that are no holes, and can't be shared with the model's files."""
    _, others = _parted(gguf, gguf.pieces(first, end, has_lm_head))
    return sum(piece.size for piece in others if piece.source is not None) + 2 * MOST_BLOCK


def _parted(gguf: Gguf, pieces: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    """The longest run of tensors that follow one another in a file, and the others."""
    places = {
        piece.name: (gguf.tensors[piece.source][0], gguf.tensors[piece.source][1].bytes)
        for piece in pieces
        if piece.source is not None
    }
    runs: list[list[Piece]] = []
    for piece in sorted((p for p in pieces if p.name in places), key=lambda p: places[p.name]):
        file, (start, _) = places[piece.name]
        last_file, (_, last_end) = places[runs[-1][-1].name] if runs else ("", (0, 0))
        if file != last_file or start != -(-last_end // ALIGNMENT) * ALIGNMENT:
            runs.append([])
        runs[-1].append(piece)
    longest = max(runs, key=lambda run: sum(piece.size for piece in run), default=[])
    names = {piece.name for piece in longest}
    return longest, [piece for piece in pieces if piece.name not in names]


def _share(gguf: Gguf, folder: Path, run: list[Piece], stream: IO[bytes], block: int) -> None:
    """Writes a run of tensors; the blocks within it are the model's own, where that can be."""
    sources = [gguf.tensors[piece.source] for piece in run if piece.source is not None]
    file, (start, end) = sources[0][0], (sources[0][1].bytes[0], sources[-1][1].bytes[1])
    stream.flush()
    at, to = stream.tell(), stream.fileno()
    inner = -(-start // block) * block, end // block * block
    shared = False
    if inner[0] < inner[1] and at % block == start % block:
        with (folder / file).open("rb") as source:
            shared = clone(source.fileno(), *inner, to, at + inner[0] - start)
    if shared:
        _copy(folder / file, (start, inner[0]), to, at)
        _copy(folder / file, (inner[1], end), to, at + inner[1] - start)
    else:
        _copy(folder / file, (start, end), to, at)
    stream.seek(at + end - start)


def write_empty(gguf: Gguf, stream: IO[bytes], first: int, end: int, has_lm_head: bool) -> None:
    """Writes a stage's header to an empty file, and a hole in place of its tensors."""
    pieces = gguf.pieces(first, end, has_lm_head)
    stream.write(_header(gguf.metadata(first, end, has_lm_head), pieces))
    stream.truncate(stream.tell() + sum(-(-each.size // ALIGNMENT) * ALIGNMENT for each in pieces))


def _copy(file: Path, where: Range, to: int, at: int) -> None:
    with file.open("rb") as source:
        start, end = where
        while start < end:
            data = os.pread(source.fileno(), min(COPY_BYTES, end - start), start)
            if not data:
                raise InputError(f"{file}: ends before byte {end}")
            write_at(to, data, at)
            start, at = start + len(data), at + len(data)


def _header(metadata: Mapping[str, Value], pieces: list[Piece], *, padded: bool = True) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(pieces), len(metadata))]
    for key, value in metadata.items():
        parts += [text(key), struct.pack("<I", value.type), value.raw]
    at = 0
    for piece in pieces:
        shape = struct.pack(f"<I{len(piece.shape)}Q", len(piece.shape), *piece.shape)
        parts += [text(piece.name), shape, struct.pack("<IQ", piece.type, at)]
        at = -(-(at + piece.size) // ALIGNMENT) * ALIGNMENT
    header = b"".join(parts)
    return header + b"\0" * (-len(header) % ALIGNMENT if padded else 0)
