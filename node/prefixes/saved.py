"""Saved caches, as they go to files: arrays by name, and plain values, without an engine."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# numpy's dtypes by the names that dtypes have on the wire; numpy has no bfloat16: its bits are
# uint16.
DTYPES: dict[str, str] = {
    "bool": "?",
    "uint8": "|u1",
    "int8": "|i1",
    "uint16": "<u2",
    "int16": "<i2",
    "float16": "<f2",
    "bfloat16": "<u2",
    "uint32": "<u4",
    "int32": "<i4",
    "float32": "<f4",
    "uint64": "<u8",
    "int64": "<i8",
    "complex64": "<c8",
}


@dataclass(frozen=True)
class SavedArray:
    """An array of `dtype`, a key of DTYPES; `values` are of numpy's dtype for it.

    axis: along which it has one place a token, from the first token on; None of other arrays.
    """

    dtype: str
    values: Array
    axis: int | None = None


# A tree of arrays, and values in JSON, flattened.
SavedLeaves = tuple[tuple[str, SavedArray | str], ...]


@dataclass(frozen=True)
class SavedEntry:
    """The state of one cache, and its class."""

    kind: str
    leaves: SavedLeaves

    @property
    def nbytes(self) -> int:
        return sum(leaf.values.nbytes for _, leaf in self.leaves if isinstance(leaf, SavedArray))
