"""How far machines get: which parts of a row of layers a set of machines can hold at all.

What a machine can hold of a row is monotone: if it can hold [j, k), it can hold any part of it.
So of all ways in which a set of machines may hold the last layers, the one that begins earliest
serves as well as any other, and one number for each set decides whether the rest fits.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Sets of one size that are looked at: all of them for any 16 machines, or 32 of four kinds.
WIDTH = 13_000


class Reach:
    """For each set of machines (counted by kind), the first layer of the longest tail it holds.

    `exact`: whether all sets were looked at, or only the most promising.
    """

    def __init__(self, counts: Sequence[int], fits: Bools, head_fits: Bools) -> None:
        """`fits[i, j, k]`: kind i can hold layers [j, k). `head_fits[i, k]`: [0, k) as head."""
        self._counts = np.asarray(counts, np.int64)
        self._strides = _strides(counts)
        layers = fits.shape[1] - 1
        # From k back to the first layer it can begin at; k itself where it can hold none.
        none = np.arange(layers + 1)
        self._starts = np.where(fits.any(axis=1), fits.argmax(axis=1), none)
        # Forward: the furthest end of a head.
        self._ends = np.where(head_fits, none, 0).max(axis=1)
        self.exact = True
        self._layers = layers

    def possible(self) -> bool:
        """Whether some set, one of its machines being the head, holds all layers."""
        return any(self._with_head(used, tails) for _, used, tails in self._levels())

    def table(self) -> tuple[Ints, Ints]:
        """The codes of all sets, ascending, and the first layer that each can begin at.

        A set's code is the sum of its counts by kind times `strides`.
        """
        levels = list(self._levels())
        codes = np.concatenate([codes for codes, _, _ in levels])
        tails = np.concatenate([tails for _, _, tails in levels])
        order = np.argsort(codes)
        return codes[order], tails[order]

    @property
    def strides(self) -> Ints:
        return self._strides

    def _with_head(self, used: Ints, tails: Ints) -> bool:
        free = used < self._counts
        return bool((free & (self._ends >= np.maximum(tails, 1)[:, None])).any())

    def _levels(self) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Sets by size: codes, counts by kind, and tails."""
        codes = np.zeros(1, np.int64)
        used = np.zeros((1, len(self._counts)), np.int64)
        tails = np.full(1, self._layers, np.int64)
        yield codes, used, tails
        for _ in range(int(self._counts.sum()) - 1):
            grown = []
            for kind, stride in enumerate(self._strides):
                free = used[:, kind] < self._counts[kind]
                one_more = used[free]
                one_more[:, kind] += 1
                grown.append((codes[free] + stride, one_more, self._starts[kind][tails[free]]))
            codes, used, tails = (np.concatenate(parts) for parts in zip(*grown, strict=True))
            order = np.lexsort((tails, codes))
            first = np.ones(len(order), np.bool_)
            first[1:] = codes[order][1:] != codes[order][:-1]
            best = order[first]
            if len(best) > WIDTH:
                self.exact = False
                best = best[np.argsort(tails[best], kind="stable")[:WIDTH]]
            codes, used, tails = codes[best], used[best], tails[best]
            yield codes, used, tails


def _strides(counts: Sequence[int]) -> Ints:
    return np.cumprod([1, *(count + 1 for count in counts[:-1])], dtype=np.int64)
