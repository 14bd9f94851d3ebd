"""Saved caches cut into blocks of tokens, which conversations that begin alike share on disk.

A block has the places of BLOCK_TOKENS tokens of all arrays that grow with the tokens; what follows
the last whole block, and all that does not grow, is the rest, in a file of the prefix itself. A
block is named by all tokens up to its end, so a longer conversation adds blocks and writes no other
again.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from node.prefixes.format import DamagedError
from node.prefixes.saved import DTYPES, Array, SavedArray, SavedEntry

BLOCK_TOKENS = 256
NAME_BYTES = 16  # of the names of prefixes and blocks, which are hashes


def block_names(tokens: Array, ring: str) -> list[bytes]:
    """Names of the whole blocks of `tokens` on the stages of a ring, in order."""
    chain = hashlib.blake2b(b"blocks\0" + ring.encode() + b"\0", digest_size=NAME_BYTES)
    data = tokens.astype("<u4")
    names = []
    for end in range(BLOCK_TOKENS, len(data) + 1, BLOCK_TOKENS):
        chain.update(data[end - BLOCK_TOKENS : end].tobytes())
        names.append(chain.copy().digest())
    return names


def split(
    entries: Sequence[SavedEntry], count: int
) -> tuple[list[list[SavedEntry]], list[SavedEntry]]:
    """The first `count` blocks of saved caches, and the rest; all share the memory of these.

    No block, and all as the rest, where there is nothing that grows.
    """
    covered = count * BLOCK_TOKENS
    growing = any(_grows(leaf, covered) for entry in entries for _, leaf in entry.leaves)
    if not covered or not growing:
        return [], list(entries)
    blocks = []
    for index in range(count):
        start = index * BLOCK_TOKENS
        blocks.append([_part(entry, start, start + BLOCK_TOKENS, covered) for entry in entries])
    return blocks, [_rest(entry, covered) for entry in entries]


def join(blocks: Sequence[Sequence[SavedEntry]], rest: Sequence[SavedEntry]) -> list[SavedEntry]:
    """The caches again. Raises DamagedError where the parts are not of the same caches."""
    if not blocks:
        return list(rest)
    return [
        _joined([block[index] for block in _of_length(blocks, len(rest))], entry)
        for index, entry in enumerate(rest)
    ]


def _grows(leaf: SavedArray | str, covered: int) -> bool:
    if not isinstance(leaf, SavedArray) or leaf.axis is None:
        return False
    return bool(leaf.values.shape[leaf.axis] >= covered)


def _part(entry: SavedEntry, start: int, end: int, covered: int) -> SavedEntry:
    leaves = [
        (key, _sliced(leaf, start, end))
        for key, leaf in entry.leaves
        if isinstance(leaf, SavedArray) and _grows(leaf, covered)
    ]
    return SavedEntry(entry.kind, tuple(leaves))


def _rest(entry: SavedEntry, covered: int) -> SavedEntry:
    """An entry whose growing arrays begin at `covered`; `axis` of the others is None."""

    def rest(leaf: SavedArray | str) -> SavedArray | str:
        if not isinstance(leaf, SavedArray):
            return leaf
        if _grows(leaf, covered):
            return _sliced(leaf, covered, None)
        return replace(leaf, axis=None)

    return SavedEntry(entry.kind, tuple((key, rest(leaf)) for key, leaf in entry.leaves))


def _sliced(leaf: SavedArray, start: int, end: int | None) -> SavedArray:
    axis = leaf.axis or 0
    where = (slice(None),) * axis + (slice(start, end),)
    return replace(leaf, values=leaf.values[where])


def _of_length(
    blocks: Sequence[Sequence[SavedEntry]], count: int
) -> Iterator[Sequence[SavedEntry]]:
    for block in blocks:
        if len(block) != count:
            raise DamagedError(f"a block of {len(block)} caches, not {count}")
        yield block


def _joined(parts: Sequence[SavedEntry], rest: SavedEntry) -> SavedEntry:
    if {part.kind for part in parts} != {rest.kind}:
        raise DamagedError("a block of other caches")
    before = [dict(part.leaves) for part in parts]
    leaves: list[tuple[str, SavedArray | str]] = []
    for key, leaf in rest.leaves:
        if not isinstance(leaf, SavedArray) or leaf.axis is None:
            leaves.append((key, leaf))
            continue
        pieces = [part.get(key) for part in before]
        leaves.append((key, _concatenated(pieces, leaf, leaf.axis)))
    return SavedEntry(rest.kind, tuple(leaves))


def _concatenated(
    pieces: Sequence[SavedArray | str | None], last: SavedArray, axis: int
) -> SavedArray:
    """One array of its pieces, each of BLOCK_TOKENS but the last."""
    shape = list(last.values.shape)
    wanted = [*shape[:axis], BLOCK_TOKENS, *shape[axis + 1 :]]
    shape[axis] += len(pieces) * BLOCK_TOKENS
    whole = np.empty(shape, DTYPES[last.dtype])
    for index, piece in enumerate(pieces):
        if (
            not isinstance(piece, SavedArray)
            or piece.dtype != last.dtype
            or list(piece.values.shape) != wanted
        ):
            raise DamagedError("a block of other arrays")
        start = index * BLOCK_TOKENS
        whole[(slice(None),) * axis + (slice(start, start + BLOCK_TOKENS),)] = piece.values
    whole[(slice(None),) * axis + (slice(len(pieces) * BLOCK_TOKENS, None),)] = last.values
    return replace(last, values=whole)
