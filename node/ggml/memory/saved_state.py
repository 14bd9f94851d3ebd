"""Saved states of llama.cpp's sequences, checked before llama.cpp reads one.

llama.cpp takes positions, cells and numbers of a saved state as they come, and all sequences share
its memory: attention multiplies even what it masks, so one number that is none, in one sequence,
reaches the others. The format (llama_state_seq_get_data of llama-cpp-python 0.3.36): a magic number
and a sequence, then a section for each part of the memory. A section of attention has the positions
of its cells, then keys and values of its layers; a recurrent one the position of its one cell, then
the layers' states. All integers are little-endian.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from node.ring.bounds import FrameError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

MAGIC = 0xAF143CD8
# numpy's dtypes of the types that this project's caches have, by their numbers in ggml.
TYPES: dict[int, str] = {0: "<f4", 1: "<f2"}
# Of numbers below these nothing becomes infinite on its way through the layers. Keys and values
# are float16 for most models, so those of float32 have no larger ones either; recurrent states are
# sums of their products.
MOST_ATTENTION = 65504.0
MOST_RECURRENT = 1e12
EXT_BYTES = 12  # of a cell: two coordinates, and a token


@dataclass(frozen=True)
class _Block:
    """Numbers of one layer: bytes of its header, dtype, and how many there are for a cell.

    transposed: all cells' first numbers come first.
    """

    header: bytes
    dtype: str
    per_cell: int
    transposed: bool = False


@dataclass(frozen=True)
class _Section:
    """One part of a memory. ext: whether its cells have EXT_BYTES; then the token in these."""

    attention: bool
    header: bytes = b""  # between the cells and the blocks
    ext: bool = False
    token: int = 0
    blocks: tuple[_Block, ...] = ()


@dataclass
class _Reader:
    data: memoryview
    at: int = 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise FrameError(f"a saved state of {len(self.data)} bytes, which is cut off")
        self.at += count
        return self.data[self.at - count : self.at]

    def integers(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))


@dataclass(frozen=True)
class StateFormat:
    """Format of the saved states of one context's sequences."""

    sections: tuple[_Section, ...] = field(repr=False)

    @classmethod
    def of(cls, state: bytes) -> "StateFormat":
        """The format by an example: a state of this context itself, of a single token.

        Raises FrameError where the memory is of a kind that is not known here.
        """
        reader = _Reader(memoryview(state))
        reader.integers("Ii")
        for sections in _parsed(state, reader.at):
            return cls(sections)
        raise FrameError("this model's caches can't be stored: llama.cpp's format is not known")

    def check(self, state: bytes, tokens: int) -> None:
        """Raises FrameError unless it is the state of a sequence of so many tokens, at least one.

        A section of attention has the last of these at least, each position once.
        """
        reader = _Reader(memoryview(state))
        magic, _ = reader.integers("Ii")
        if magic != MAGIC:
            raise FrameError("a saved state without llama.cpp's magic number")
        for section in self.sections:
            cells = _check_cells(reader, section, tokens)
            if bytes(reader.take(len(section.header))) != section.header:
                raise FrameError("a saved state of other layers")
            for block in section.blocks:
                _check_block(reader, section, block, cells)
        if reader.at != len(state):
            raise FrameError(f"a saved state with {len(state) - reader.at} bytes too many")

    def pieces(self, state: Bytes, tokens: int) -> list[tuple[Bytes, int | None]]:
        """The bytes of a state in order, as arrays of which some have one place a token: each with
        the axis of these, or None. Cells are in the order of their tokens.

        Raises FrameError where it is not the state of a sequence of so many tokens.
        """
        reader, pieces = _Reader(state.data), list[tuple[Bytes, int | None]]()
        fixed = 0  # where the bytes begin that are not in a piece yet
        reader.integers("Ii")
        for section in self.sections:
            start = reader.at + 8
            count = _check_cells(reader, section, tokens)
            grows = section.attention and count == tokens
            order: Any = slice(None)
            if grows:
                cells = state[start : reader.at].reshape(count, -1)
                positions = cells[:, :4].copy().view("<i4")[:, 0]
                if (np.diff(positions) < 0).any():  # llama.cpp uses cells of others again
                    order = np.argsort(positions)
                pieces += [(state[fixed:start], None), (cells[order], None)]
                fixed = reader.at
            reader.take(len(section.header))
            for block in section.blocks:
                reader.take(len(block.header))
                at, size = reader.at, np.dtype(block.dtype).itemsize
                reader.take(size * block.per_cell * count)
                if grows and block.per_cell:
                    numbers, pieces = state[at : reader.at], [*pieces, (state[fixed:at], None)]
                    if block.transposed:
                        numbers = numbers.reshape(block.per_cell, count, size)[:, order]
                    else:
                        numbers = numbers.reshape(count, -1)[order]
                    pieces.append((numbers, int(block.transposed)))
                    fixed = reader.at
        return [*pieces, (state[fixed:], None)]


def _check_cells(reader: _Reader, section: _Section, tokens: int) -> int:
    """Number of a section's cells, of which the positions are checked."""
    if not section.attention:
        count, position, sequences = reader.integers("IiI")
        if (count, position, sequences) != (1, tokens - 1, 0):
            raise FrameError(f"{count} recurrent cells at {position}, not one at {tokens - 1}")
        return 1
    streams, count = reader.integers("II")
    if streams != 1 or not 1 <= count <= tokens:
        raise FrameError(f"{count} cells in {streams} streams, for {tokens} tokens")
    size = 12 + EXT_BYTES * section.ext
    columns = np.frombuffer(reader.take(count * size), "<i4").reshape(count, -1)
    positions = columns[:, 0]
    if not np.array_equal(np.sort(positions), np.arange(tokens - count, tokens)):
        raise FrameError(f"cells of other positions than the last {count} of {tokens}")
    if (columns[:, 1] != 1).any():
        raise FrameError("a cell of several sequences")
    if section.ext and (
        (columns[:, 2:4] != positions[:, None]).any() or (columns[:, 4] != section.token).any()
    ):
        raise FrameError("a cell at other coordinates than its position")
    return count


def _check_block(reader: _Reader, section: _Section, block: _Block, cells: int) -> None:
    if bytes(reader.take(len(block.header))) != block.header:
        raise FrameError("a saved state of other types or sizes")
    size = np.dtype(block.dtype).itemsize * block.per_cell * cells
    numbers = np.frombuffer(reader.take(size), block.dtype)
    if not numbers.size:
        return
    largest = max(-float(numbers.min()), float(numbers.max()))
    most = MOST_ATTENTION if section.attention else MOST_RECURRENT
    if not largest <= most:  # as it also is for what is no number
        raise FrameError(f"a saved state with a number of {largest}")


def _parsed(state: bytes, at: int) -> Iterator[tuple[_Section, ...]]:
    """All ways to read the sections from `at` to the end, each of a single cell."""
    if at == len(state):
        yield ()
        return
    for read in (_attention(state, at), _recurrent(state, at)):
        for section, end in read:
            for rest in _parsed(state, end):
                yield (section, *rest)


def _attention(state: bytes, start: int) -> Iterator[tuple[_Section, int]]:
    """Ways to read a section of attention, each with its end."""
    for ext in (False, True):
        for has_values in (True, False):
            reader, token, blocks = _Reader(memoryview(state), start), 0, []
            try:
                streams, count, position, sequences = reader.integers("IIiI")
                if ext:
                    token = reader.integers("iii")[2]
                reader.take(4)
                header = bytes(reader.take(8))
                transposed, layers = struct.unpack("<II", header)
                if (streams, count, position, sequences) != (1, 1, 0, 1) or transposed > 1:
                    continue
                blocks = [_rows(reader) for _ in range(layers)]
                if has_values:
                    values = _transposed if transposed else _rows
                    blocks += [values(reader) for _ in range(layers)]
            except FrameError:
                continue
            yield _Section(True, header, ext, token, tuple(blocks)), reader.at


def _recurrent(state: bytes, start: int) -> Iterator[tuple[_Section, int]]:
    """The way to read a recurrent section, which ends with the state."""
    reader, blocks = _Reader(memoryview(state), start), []
    try:
        count, position, sequences = reader.integers("IiI")
        header = bytes(reader.take(8))
        if (count, position, sequences) != (1, 0, 0) or header[:4] != bytes(4):
            return
        while reader.at < len(state):
            blocks.append(_rows(reader))
    except FrameError:
        return
    yield _Section(False, header, blocks=tuple(blocks)), reader.at


def _rows(reader: _Reader) -> _Block:
    """A block of one row a cell: its type, bytes of a row, and the row."""
    start = reader.at
    kind, size = reader.integers("iQ")
    return _block(reader, start, kind, size)


def _transposed(reader: _Reader) -> _Block:
    """A block of one row a number: its type, bytes of a number, numbers of a cell."""
    start = reader.at
    kind, size, count = reader.integers("iII")
    return replace(_block(reader, start, kind, size * count), transposed=True)


def _block(reader: _Reader, start: int, kind: int, size: int) -> _Block:
    header = bytes(reader.data[start : reader.at])
    reader.take(size)
    dtype = TYPES.get(kind, "")
    if not dtype or size % np.dtype(dtype).itemsize:
        raise FrameError(f"numbers of ggml's type {kind}, {size} bytes of them")
    return _Block(header, dtype, size // np.dtype(dtype).itemsize)
